"""The reference against the rule in plain Python; the vector kernel against the reference, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.bits import pack_bits
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import ewma_select as kernels
from hwpq_pipeline.kernels.ewma_select import Average, reference

NAN = float("nan")
PLAIN = Average(alpha=1 / 64, beta=1 / 64, domain="sqrt")

#: How far the logarithm's polynomial is off, at most.
LOG_ERROR = 1.3e-4


def in_python(row: list[float], lam: float, alpha: float, beta: float) -> list[tuple[bool, float, float]]:
    """The published rule on one row in Python floats, warm start and all, written from the text.

    For every weight: whether it stays, its distance from the line, and the size |x| + |μ| + (1 + |λ|) σ of what the
    distance is the difference of.
    """
    warm = min(len(row), math.ceil(2 / min(alpha, beta)))
    mu, sigma = row[len(row) - warm], 0.0
    for t, value in enumerate(row[len(row) - warm :]):
        away = value - mu
        sigma += max(beta, 1 / (t + 1)) * (abs(away) - sigma)
        mu += max(alpha, 1 / (t + 1)) * away
    found = []
    for value in row:
        line = mu + lam * sigma
        found.append((value >= line, abs(value - line), abs(value) + abs(mu) + (1 + abs(lam)) * sigma))
        away = value - mu
        sigma += beta * (abs(away) - sigma)
        mu += alpha * away
    return found


def factors(rows: int, columns: int, crossed: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    column = torch.rand(columns, generator=generator) + 0.5
    if not crossed:
        return column, torch.zeros(rows), torch.zeros(columns)
    return column, torch.rand(rows, generator=generator), torch.rand(columns, generator=generator)


def compare(weight: Tensor, parts: tuple[Tensor, Tensor, Tensor], lam: Tensor, **options: Any) -> kernels.EwmaPass:
    """Mask, counts and last states of the kernel are the reference's."""
    average = replace(PLAIN, **options)
    keep, state = reference.ewma_select(weight, *parts, lam, average)
    found = kernels.ewma_select(weight, *parts, lam, average)
    assert torch.equal(found.keep, pack_bits(keep))
    assert torch.equal(found.kept, keep.sum(dim=1))
    assert torch.equal(found.state, state)
    return found


@pytest.mark.parametrize(("alpha", "beta"), [(1 / 64, 1 / 64), (1 / 8, 1 / 4), (1.0, 0.5)])
@pytest.mark.parametrize("columns", [1, 5, 64, 300])
@pytest.mark.parametrize("domain", ["sqrt", "raw", "log"])
def test_the_reference_is_the_rule(alpha: float, beta: float, columns: int, domain: str) -> None:
    """Every weight is on the rule's side of the line, but for those that float32 (or the logarithm) cannot tell apart.

    A value that is off by e, μ and σ with it by e and 2e at most (both are means), moves a weight by (2 + 2|λ|) e
    against the line: with the logarithm's error for e this is the first term. Rounding is the second: 2⁻²⁴ of the
    numbers in play at each step, and a step's error fades by 1 − β a column, so that 1/β of them add up: 64 · 2⁻²⁴ is
    below 4e-6.
    """
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)) + 3
    parts, lams = factors(4, columns, crossed=True), [-0.5, 0.0, 0.3, 1.5]
    keep, _ = reference.ewma_select(weight, *parts, torch.tensor(lams), Average(alpha, beta, domain))
    column, row, cross = (part.double() for part in parts)
    z = weight.double().abs() * (column + row[:, None] * cross)
    x = {"sqrt": z, "raw": z**2, "log": z.log2()}[domain]
    near = 0
    for i, lam in enumerate(lams):
        for j, (expected, distance, size) in enumerate(in_python(x[i].tolist(), lam, alpha, beta)):
            if distance <= (2 + 2 * abs(lam)) * (LOG_ERROR if domain == "log" else 0.0) + 4e-6 * size:
                near += 1
            else:
                assert bool(keep[i, j]) == expected, (i, j)
    if columns == 1:  # the one value is μ itself, σ is 0: it lies on the line to the bit, and stays
        assert near == 4
        assert bool(keep.all())
    else:
        assert near <= 0.01 * keep.numel()
        assert keep.any()
        assert not keep.all()


def test_the_logarithm_is_near_and_rises() -> None:
    z = torch.logspace(-37, 37, 20001, dtype=torch.float64).float().numpy()
    assert np.abs(reference.log2(z) - np.log2(z.astype(np.float64))).max() < LOG_ERROR
    low = np.array([0, 1e-45, 1e-40, 1.1754943e-38], np.float32)  # zero, subnormals, the first normal number
    assert reference.log2(low).tolist() == sorted(reference.log2(low).tolist())
    assert reference.log2(low)[0] == -127
    assert reference.log2(low)[-1] == -126
    assert (np.diff(reference.log2(np.linspace(1, 2, 4001, dtype=np.float32))) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (16, 8), (17, 31), (2, 32), (33, 33), (40, 191), (5, 200), (16, 576)]
)
def test_equal_to_the_reference_at_odd_sizes(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    lam = torch.randn(rows, generator=generator) / 2
    compare(weight, factors(rows, columns), lam)
    compare(weight, factors(rows, columns), lam, alpha=1 / 8, beta=1 / 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("domain", ["raw", "log"])
def test_equal_to_the_reference_in_other_domains(dtype: torch.dtype, domain: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(21, 205, generator=generator).to(dtype)
    weight[:, ::5] = 0
    compare(weight, factors(21, 205), torch.randn(21, generator=generator), domain=domain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_reference_with_cross_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(21, 205, generator=generator).to(dtype)
    compare(weight, factors(21, 205, crossed=True), torch.randn(21, generator=generator))


def test_other_dtypes_are_converted() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float16, torch.float64):
        compare(weight.to(dtype), factors(5, 70), torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_read_nothing_else(dtype: torch.dtype) -> None:
    store = torch.full((20, 130), NAN, dtype=dtype)  # what is not the weight is poison
    weight = store[1:, 5:106]
    weight.copy_(torch.randn(19, 101, generator=torch.Generator().manual_seed(4)))
    compare(weight, factors(19, 101), torch.zeros(19))
    compare(weight[::3], factors(7, 101), torch.zeros(7))
    compare(weight[:1].expand(6, -1), factors(6, 101), torch.zeros(6))
    compare(store[1:, 5:106].T.contiguous().T, factors(19, 101), torch.zeros(19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("domain", ["sqrt", "log", "raw"])
def test_equal_rows_zeros_and_subnormals(dtype: torch.dtype, domain: str) -> None:
    ones = torch.ones(250), torch.zeros(3), torch.zeros(250)
    lam = torch.tensor([-4.0, 0.5, 4.0])
    for value in (0.0, -0.7, 1e-39, 3e18):
        found = compare(torch.full((3, 250), value, dtype=dtype), ones, lam, domain=domain)
        assert found.kept.tolist() == [250] * 3  # no spread: nothing lies below the threshold
        assert found.state[:, 1].tolist() == [0] * 3
    tiny = (torch.randn(3, 250, generator=torch.Generator().manual_seed(5)) * 1e-39).to(dtype)
    found = compare(tiny, ones, torch.zeros(3), domain=domain)
    assert domain == "raw" or 0 < int(found.kept.sum()) < 750  # squares of subnormals are all zero


def test_many_rows_on_any_number_of_threads() -> None:
    weight = torch.randn(1000, 333, generator=torch.Generator().manual_seed(6)).bfloat16()
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, before):
            numba.set_num_threads(threads)
            results.append(compare(weight, factors(1000, 333), torch.zeros(1000)).keep)
    finally:
        numba.set_num_threads(before)
    assert torch.equal(*results)


def test_non_finite_weights_show_in_the_state() -> None:
    for bad in (NAN, float("inf")):
        for column in (0, 40, 299):
            weight = torch.ones(20, 300)
            weight[7, column] = bad
            state = kernels.ewma_select(weight, *factors(20, 300), torch.zeros(20), PLAIN).state
            assert (~state.isfinite().all(dim=1)).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (20, 77), (32, 320)])
def test_ratios_tell_what_any_multiplier_drops(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)
    parts = factors(rows, columns)
    ratios = kernels.ewma_ratios(weight, *parts, PLAIN)
    for lam in (-1.0, 0.013, 2.0):
        below = ratios.matrix() < lam
        found = kernels.ewma_select(weight, *parts, torch.tensor(lam), PLAIN)
        assert torch.equal(found.keep, pack_bits(~below))
        assert torch.equal(ratios.below(lam), below.sum(dim=1))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.97])
def test_searched_multipliers_drop_the_wanted_number(share: float) -> None:
    # Heavy tails: ratios from below -1 to some hundreds.
    weight = torch.from_numpy(np.random.default_rng(8).standard_t(1.2, (50, 401))).float()
    parts = factors(50, 401)
    drop = round(share * 401)
    lam = kernels.ewma_row_multipliers(weight, *parts, torch.full((50,), drop), PLAIN)
    kept = kernels.ewma_select(weight, *parts, lam, PLAIN).kept
    assert (401 - kept - drop).abs().max() <= 1
    ratios = kernels.ewma_ratios(weight, *parts, PLAIN)
    together = round(share * 50 * 401)
    values = ratios.matrix().flatten().sort().values
    assert values[together - 1] < ratios.multiplier(together) <= values[together]


def test_bad_arguments_are_named() -> None:
    weight, parts, lam = torch.ones(2, 8), factors(2, 8), torch.zeros(2)
    with pytest.raises(HwpqError, match="no kernel for the device 'meta'"):
        kernels.ewma_select(weight.to("meta"), *parts, lam, PLAIN)
    with pytest.raises(HwpqError, match="unknown domain 'cubic'"):
        kernels.ewma_select(weight, *parts, lam, replace(PLAIN, domain="cubic"))
    for gain in (0, -1, 1.5, NAN):
        with pytest.raises(HwpqError, match=r"beta is .*A gain lies in \(0, 1\]"):
            kernels.ewma_select(weight, *parts, lam, replace(PLAIN, beta=gain))
