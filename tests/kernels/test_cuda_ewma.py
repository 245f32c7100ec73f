"""The moving average's CUDA kernel against the reference; see `test_cuda` for where it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hwpq-pipeline[cuda]'")

from hwpq_pipeline.compression.bits import pack_bits, unpack_bits
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.ewma_select import LARGEST, Average
from hwpq_pipeline.kernels.ewma_select import cuda as ewma
from hwpq_pipeline.kernels.ewma_select import reference as ewma_reference
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains
from tests.kernels.cuda import DEVICE, DTYPES, NAN, factors, random, there

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = ewma.Tile(4, 32, 4, 2)
PLAIN = Average(alpha=1 / 64, beta=1 / 64, domain="sqrt")


def compare_ewma(
    weight: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    lam: Tensor,
    average: Average = PLAIN,
    tile: ewma.Tile = SMALL,
) -> tuple[Tensor, Tensor]:
    """The mask is the reference's but within the stated distance of the line; counts are the mask's."""
    _rows, columns = weight.shape
    on_device = weight if weight.device.type == DEVICE else weight.to(DEVICE)
    keep, kept, state = ewma.Pass(on_device, *there(*parts), average, tile).select(lam.to(DEVICE))
    keep, kept, state = keep.cpu(), kept.cpu(), state.cpu()
    expected, last = ewma_reference.ewma_select(weight, *parts, lam, average)
    found = unpack_bits(keep, columns)
    assert torch.equal(pack_bits(found), keep)  # no bit beyond the last column
    assert torch.equal(found.sum(1), kept)
    wrong = found != expected
    line, scale = distances(ewma_reference.levels(weight, *parts, average.domain), lam, average)
    assert bool((line[wrong] <= ewma.TIE * scale[wrong]).all()), (line / scale)[wrong].max()
    assert float(wrong.double().mean()) <= 0.002
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5 * float(last.abs().max()))
    return found, state


def distances(x: Any, lam: Tensor, average: Average) -> tuple[Tensor, Tensor]:
    """`|d − λβS|` and `|x| + |μ| + (1 + |λ|) S` of every weight, float64, by the rule."""
    x, lams = x.astype(np.float64), lam.double().numpy()
    mu, total, (_rows, columns) = np.zeros(len(x)), np.zeros(len(x)), x.shape
    alpha, beta = average.alpha, average.beta
    alphas, fades, weights = warm_gains(alpha, beta, columns)
    line, scale = np.zeros(x.shape), np.zeros(x.shape)
    for step, j in enumerate(range(columns - len(alphas), columns)):
        away = x[:, j] - mu
        total, mu = fades[step] * total + weights[step] * np.abs(away), mu + alphas[step] * away
    for j in range(columns):
        away = x[:, j] - mu
        line[:, j] = np.abs(away - lams * beta * total)
        scale[:, j] = np.abs(x[:, j]) + np.abs(mu) + (1 + np.abs(lams)) * total
        total, mu = (1 - beta) * total + np.abs(away), mu + alpha * away
    return torch.from_numpy(line), torch.from_numpy(scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (1, 32), (5, 33), (6, 131), (2, 200)])
def test_ewma_at_odd_sizes(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, lam = random(rows, columns).to(dtype), random(rows, seed=4) / 2
    compare_ewma(weight, factors(rows, columns), lam)
    compare_ewma(weight, factors(rows, columns, crossed=True), lam, replace(PLAIN, alpha=1 / 8, beta=1 / 16))


@pytest.mark.parametrize("domain", ["raw", "log"])
def test_ewma_in_other_domains_and_with_outliers(domain: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(8).standard_t(1.2, (3, 131))).float()
    weight[:, ::5] = 0
    compare_ewma(weight, factors(3, 131), random(3, seed=5), replace(PLAIN, domain=domain))


def test_ewma_with_the_papers_gains_and_many_weights() -> None:
    paper, tile = Average(1 / 8, 1 / 8, "raw"), ewma.Tile(64, 64, 4, 1)
    found, _ = compare_ewma(random(64, 160), factors(64, 160), torch.zeros(64), paper, tile)
    assert 0.1 < found.double().mean() < 0.9


@pytest.mark.parametrize("value", [0.0, -0.7, 3e18])
def test_ewma_keeps_rows_without_spread_whole(value: float) -> None:
    ones = torch.rand(1).expand(150).clone(), torch.zeros(3), torch.zeros(150)
    found, state = compare_ewma(torch.full((3, 150), value), ones, torch.tensor([-4.0, 0.5, 4.0]))
    assert bool(found.all())
    assert state[:, 1].tolist() == [0] * 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: infinities are meant
def test_ewma_keeps_everything_at_the_lowest_multiplier() -> None:
    weight = random(2, 150) * 10 ** (4 * random(2, 150, seed=6))
    lowest = torch.full((2,), -LARGEST)
    _keep, kept, _ = ewma.Pass(weight.to(DEVICE), *there(*factors(2, 150)), PLAIN, SMALL).select(lowest.to(DEVICE))
    assert kept.tolist() == [150, 150]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ewma_shows_non_finite_weights_in_the_state() -> None:
    for bad in (NAN, float("inf")):
        for column in (0, 40, 149):
            weight = random(4, 150)
            weight[2, column] = bad
            lam = torch.zeros(4, device=DEVICE)
            *_, state = ewma.Pass(weight.to(DEVICE), *there(*factors(4, 150)), PLAIN, SMALL).select(lam)
            assert (~state.isfinite().all(1)).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ewma_of_strided_rows_reads_nothing_else(dtype: torch.dtype) -> None:
    store = torch.full((6, 130), NAN, dtype=dtype, device=DEVICE)  # what is not the weight is poison
    weight = store[1:, 5:106]
    weight.copy_(random(5, 101))
    for some in (weight, weight[::3], weight[:1].expand(3, -1), weight.T.contiguous().T):
        keep, kept, _ = ewma.Pass(some, *there(*factors(len(some), 101)), PLAIN, SMALL).select(
            torch.zeros(len(some), device=DEVICE)
        )
        whole = ewma.Pass(
            some.clone(memory_format=torch.contiguous_format), *there(*factors(len(some), 101)), PLAIN, SMALL
        )
        assert torch.equal(keep, whole.select(torch.zeros(len(some), device=DEVICE))[0])
        assert bool(((kept > 0) & (kept < 101)).all())


@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (5, 77)])
def test_ewma_ratios_tell_what_any_multiplier_drops(rows: int, columns: int) -> None:
    layer = ewma.Pass(*there(random(rows, columns), *factors(rows, columns)), PLAIN, SMALL)
    ratios = layer.ratios()
    rungs = torch.tensor([2.0, -1.0, 0.013], device=DEVICE)
    for lam, count in zip(rungs.tolist(), layer.dropped(rungs).tolist(), strict=True):
        keep, kept, _ = layer.select(torch.full((rows,), lam, device=DEVICE))
        below = ratios.matrix() < lam
        assert (unpack_bits(keep, columns) == below).sum() <= 1  # a division rounds
        assert torch.equal(ratios.below(lam), below.sum(1))
        assert count == int(below.sum())
        assert (kept - (columns - below.sum(1))).abs().max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.97])
def test_ewma_searches_multipliers_that_drop_the_wanted_number(share: float) -> None:
    weight = torch.from_numpy(np.random.default_rng(9).standard_t(1.2, (5, 101))).float()
    layer = ewma.Pass(*there(weight, *factors(5, 101)), PLAIN, SMALL)
    drop = round(share * 101)
    lam = layer.row_multipliers(torch.full((5,), drop, device=DEVICE))
    _, kept, _ = layer.select(lam)
    assert (101 - kept - drop).abs().max() <= 1
    ratios, together = layer.ratios(), round(share * 505)
    assert int(ratios.below(ratios.multiplier(together)).sum()) == together
    assert int(ratios.below(ratios.multiplier(505)).sum()) == 505


def test_ewma_refuses_gains_that_it_cannot_keep_to() -> None:
    with pytest.raises(HwpqError, match=r"beta is 0\.75.*Set device to cpu"):
        ewma.Pass(*there(random(2, 8), *factors(2, 8)), Average(0.5, 0.75, "sqrt"))
