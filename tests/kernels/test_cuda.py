"""The CUDA kernels against the references: on a GPU where there is one, else under Triton's interpreter on the CPU.

The interpreter takes about a second for some hundred columns, so sizes are small. What it cannot show (types, layouts,
registers) the compiler can without a GPU: the last test builds every kernel for real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hwpq-pipeline[cuda]'")

from hwpq_pipeline.compression.bits import pack_bits, unpack_bits
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.coordinate_descent import Walk
from hwpq_pipeline.kernels.coordinate_descent import cuda as descent
from hwpq_pipeline.kernels.coordinate_descent import reference as descent_reference
from hwpq_pipeline.kernels.ewma_select import LARGEST, Average
from hwpq_pipeline.kernels.ewma_select import cuda as ewma
from hwpq_pipeline.kernels.ewma_select import reference as ewma_reference
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains
from hwpq_pipeline.kernels.fp8 import cuda as fp8
from hwpq_pipeline.kernels.fp8 import reference as fp8_reference
from hwpq_pipeline.kernels.group_scale import cuda as scales
from hwpq_pipeline.kernels.group_scale import reference as scales_reference
from hwpq_pipeline.kernels.two_of_four import cuda as fours
from hwpq_pipeline.kernels.two_of_four import reference as fours_reference

NAN = float("nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SMALL = ewma.Tile(4, 32, 4, 2)
PLAIN = Average(alpha=1 / 64, beta=1 / 64, domain="sqrt")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without being written holds NaN, or ones in every bit: an element left out shows."""
    real = torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        tensor = real(*arguments, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(NAN)
        return tensor.fill_(255 if tensor.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", empty)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rows: int, columns: int, crossed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    column = random(columns, seed=1).abs() + 0.5
    if not crossed:
        return column, torch.zeros(rows), torch.zeros(columns)
    return column, random(rows, seed=2).abs(), random(columns, seed=3).abs()


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


# --- the moving average


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


# --- two of four


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 12), (5, 36), (2, 100)])
@pytest.mark.parametrize("crossed", [False, True])
def test_two_of_four_is_the_reference_to_the_bit(dtype: torch.dtype, rows: int, columns: int, crossed: bool) -> None:
    tile = fours.Tile(2, 32, 1)
    for weight in ((4 * random(rows, columns)).round(), random(rows, columns), torch.zeros(rows, columns)):
        parts = factors(rows, columns, crossed)
        keep, finite = fours.select(*there(weight.to(dtype), *parts), tile)
        assert bool(finite.all())
        assert torch.equal(keep.cpu(), pack_bits(fours_reference.select_two_of_four(weight.to(dtype), *parts)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_of_four_names_rows_that_are_not_finite() -> None:
    weight = random(5, 68)
    weight[1, 3], weight[4, 67] = NAN, float("inf")
    _, finite = fours.select(*there(weight, *factors(5, 68)), fours.Tile(2, 32, 1))
    assert finite.tolist() == [True, False, True, True, False]


# --- addresses


@pytest.mark.parametrize("kernel", ["ewma", "two_of_four", "fp8"])
def test_rows_further_apart_than_32_bits_can_tell(kernel: str) -> None:
    """Two rows 2³¹ + 16 elements apart: a virtual 4 GiB, of which only the rows' pages are ever touched."""
    stride, columns = 2**31 + 16, 40
    memory = _untouched(stride + columns)
    weight = memory.as_strided((2, columns), (stride, 1))
    weight.copy_(random(2, columns))
    near, parts = weight.clone(memory_format=torch.contiguous_format), there(*factors(2, columns))
    if kernel == "ewma":
        lam = torch.zeros(2, device=DEVICE)
        far, close = (ewma.Pass(w, *parts, PLAIN, SMALL).select(lam) for w in (weight, near))
    elif kernel == "two_of_four":
        far, close = (fours.select(w, *parts, fours.Tile(2, 32, 1)) for w in (weight, near))
    else:
        far, close = ((codes.view(torch.uint8), scale) for codes, scale in (fp8.quantize(w) for w in (weight, near)))
    assert all(torch.equal(one, other) for one, other in zip(far, close, strict=True))


def _untouched(elements: int) -> Tensor:
    if DEVICE == "cuda":
        return torch.zeros(elements, dtype=torch.bfloat16, device=DEVICE)
    return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)  # calloc: pages come when touched


# --- FP8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 1100)])
def test_fp8_is_torchs_own_to_the_bit(dtype: torch.dtype, scale_dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = (random(rows, columns) * 10 ** (2 * random(rows, columns, seed=7))).to(dtype)  # subnormal codes, too
    weight[-1, columns // 2 :] = 0
    codes, scale = fp8.quantize(weight.to(DEVICE), scale_dtype)
    expected, wanted = fp8_reference.quantize(weight, scale_dtype)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale.cpu(), wanted)


def test_fp8_rounds_every_kind_of_number_as_torch_does() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    weight = torch.cat([near, -near, torch.tensor([448.0])])[None]  # 448 makes the scale one
    found, scale = fp8.quantize(weight.to(DEVICE))
    assert scale.item() == 1
    assert torch.equal(found.cpu().view(torch.uint8), weight.to(torch.float8_e4m3fn).view(torch.uint8))


# --- rounding to integers


def problem(rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = random(4 * columns, columns, seed=8) + random(4 * columns, 3, seed=9) @ random(3, columns, seed=10)
    weight = random(rows, columns, seed=11)
    scale = random(rows, groups, seed=12).abs() * 0.1 + 0.2
    codes = (weight / scale.repeat_interleave(columns // groups, 1)).round().clamp(-8, 7).to(torch.int8)
    return codes, scale, weight, inputs.T @ inputs / columns


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 4, 1), (9, 33, 3), (3, 96, 2)])
def test_coordinate_descent_reaches_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, groups: int, masked: bool, refit: bool
) -> None:
    monkeypatch.setattr(descent, "PANEL", 66)  # several panels, of unequal size
    codes, scale, weight, gram = problem(rows, columns, groups)
    mask = None
    if masked:
        mask = random(rows, columns, seed=13) < 0.3
        codes = codes * mask
    walk = Walk(-8.0, 7.0, sweeps=2, refit=refit)
    slow_codes, slow_scale = descent_reference.descend(codes, scale, weight, gram, mask, walk)
    arguments = there(codes, scale, weight, gram)
    fast = descent.descend(*arguments, None if mask is None else mask.to(DEVICE), walk)
    fast_codes, fast_scale, before, after = (part.cpu() for part in fast)
    assert (fast_codes == slow_codes).double().mean() >= 0.98  # near-ties may fall to either side, and pull others
    torch.testing.assert_close(fast_scale.double(), slow_scale, rtol=0.02, atol=1e-4)
    slow, reached, start = (
        descent_reference.objective(c.double() * s.double().repeat_interleave(columns // groups, 1), weight, gram)
        for c, s in ((slow_codes, slow_scale), (fast_codes, fast_scale), (codes, scale))
    )
    torch.testing.assert_close(reached, slow, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(after.double(), reached, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(before.double(), start, rtol=1e-3, atol=1e-5)
    if mask is not None:
        assert bool((fast_codes[~mask] == 0).all())


def test_coordinate_descent_keeps_scales_to_the_stored_type() -> None:
    codes, scale, weight, gram = problem(3, 32, 2)
    scale = scale.bfloat16().float()
    walk = Walk(-8.0, 7.0, sweeps=2, refit=True, scale_dtype=torch.bfloat16)
    _, found, before, after = descent.descend(*there(codes, scale, weight, gram), None, walk)
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.equal(found.cpu(), scale)
    assert bool((after < before).all())


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (3, 5, 33), (2, 3, 64)])
def test_searched_scales_have_the_reference_error(rows: int, groups: int, size: int) -> None:
    grouped, importance = random(rows, groups, size), random(groups, size, seed=14).abs()
    full = grouped.abs().amax(2) / 7
    found = scales.search(*there(grouped, full, importance), -8.0, 7.0).cpu()
    expected = scales_reference.search(grouped, full, importance, -8.0, 7.0)
    one, other = (
        scales_reference.errors(grouped.double(), s.double(), importance.double(), -8.0, 7.0) for s in (found, expected)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


# --- real machine code


@pytest.mark.slow
def test_every_kernel_compiles_for_real_gpus(root: Path) -> None:
    """Triton's compiler needs no GPU. A kernel that spills registers would be slow: none does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'src'}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_cuda"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert len(built) >= 12
    assert {name: row["stack"] for name, row in built.items() if row["stack"]} == {}
