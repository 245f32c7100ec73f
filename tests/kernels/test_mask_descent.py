"""The kernels, and the readable version, against exhaustive search with numpy's least squares on the inputs."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import mask_descent
from hwpq_pipeline.kernels.mask_descent import State, reference

Array = np.ndarray[Any, np.dtype[np.float64]]


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Array]:
    """Target, correlation matrix (ones on the diagonal), and the float64 inputs (tokens, columns) that make it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs = inputs + torch.randn(3 * columns, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    inputs = inputs.double() / torch.linalg.vector_norm(inputs.double(), dim=0)
    return torch.randn(rows, columns, generator=generator), (inputs.T @ inputs).float(), inputs.numpy()


def begin(target: Tensor, gram: Tensor, keep: Tensor | None = None) -> State:
    """A descent at the dense weights."""
    mask = torch.zeros(target.shape, dtype=torch.bool) if keep is None else keep
    return State(target.clone(), mask, torch.zeros_like(target), gram)


def carried(state: State, target: Tensor) -> None:
    """The gradient that a kernel carried along is that of the values it left."""
    torch.testing.assert_close(state.gradient, (state.values - target) @ state.gram, rtol=1e-3, atol=1e-3)


def errors(values: Array, target: Array, inputs: Array) -> Array:
    """(rows,) ½ ‖X(v − v₀)‖², from the inputs."""
    result: Array = 0.5 * np.square((values - target) @ inputs.T).sum(1)
    return result


def solve(values: Array, target: Array, inputs: Array, free: list[int]) -> tuple[Array, float]:
    """The best values of a row's free columns, all others as they are, and the row's error ½ ‖X(v − v₀)‖² then."""
    fixed = values.copy()
    fixed[free] = 0.0
    wanted = inputs @ (target - fixed)
    fixed[free] = np.linalg.lstsq(inputs[:, free], wanted, rcond=None)[0]
    return fixed, float(errors(fixed[None], target[None], inputs)[0])


def sweep_pairs(values: Array, target: Array, inputs: Array, shrink: float) -> tuple[Array, Array]:
    """One sweep over groups of four by trying all six pairs: values and mask."""
    values, keep = values.copy(), np.zeros(values.shape, bool)
    for row in range(values.shape[0]):
        for first in range(0, values.shape[1], 4):
            now = values[row, first : first + 4].copy()
            values[row, first : first + 4] = 0.0  # a pair is judged as if the other two were gone
            pairs = [list(pair) for pair in combinations(range(first, first + 4), 2)]
            best = min(pairs, key=lambda pair: solve(values[row], target[row], inputs, pair)[1])
            values[row, first : first + 4] = shrink * now
            values[row], _ = solve(values[row], target[row], inputs, best)
            keep[row, best] = True
    return values, keep


def sweep_columns(
    target: Array, inputs: Array, shrink: float, *, threshold: float = 0.0, mask: Array | None = None
) -> tuple[Array, Array]:
    """One sweep over single columns from the target: values, and the root of twice what keeping each one gains."""
    values, scores = target.copy(), np.zeros(target.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            without = values[row].copy()
            without[column] = 0.0
            best, error = solve(values[row], target[row], inputs, [column])
            gain = float(errors(without[None], target[row][None], inputs)[0]) - error
            scores[row, column] = np.sqrt(2 * max(gain, 0.0))
            if scores[row, column] > threshold if mask is None else mask[row, column]:
                values[row] = best
            else:
                values[row, column] *= shrink
    return values, scores


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 60), (2, 64), (2, 132)])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_every_group_keeps_the_best_of_its_six_pairs(rows: int, columns: int, shrink: float) -> None:
    target, gram, inputs = problem(rows, columns, columns)
    state, inverses = begin(target, gram), mask_descent.pair_inverses(gram)
    slow, expected = target, target.double().numpy()
    for _ in range(2):
        mask_descent.two_of_four(state, inverses, shrink)
        slow, slow_keep = reference.two_of_four(slow, target, gram, shrink)
        expected, keep = sweep_pairs(expected, target.double().numpy(), inputs, shrink)
    for found, mask in ((state.values, state.keep), (slow, slow_keep)):
        assert np.array_equal(mask.numpy(), keep)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-2, atol=1e-3)
    mine, best = (errors(v, target.double().numpy(), inputs) for v in (state.values.double().numpy(), expected))
    np.testing.assert_allclose(mine, best, rtol=1e-4)
    carried(state, target)


def test_sweeps_that_drop_never_raise_the_error() -> None:
    target, gram, inputs = problem(5, 48, 3)
    state, inverses = begin(target, gram), mask_descent.pair_inverses(gram)
    found = []
    for _ in range(6):
        mask_descent.two_of_four(state, inverses, 0.0)
        found.append(errors(state.values.double().numpy(), target.double().numpy(), inputs))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in pairwise(found))
    assert found[-1].sum() < 0.98 * found[0].sum()


def test_the_last_sweep_gives_the_same_values() -> None:
    target, gram, _ = problem(3, 132, 5)
    whole, last = begin(target, gram), begin(target, gram)
    mask_descent.two_of_four(whole, mask_descent.pair_inverses(gram), 0.5)
    mask_descent.two_of_four(last, mask_descent.pair_inverses(gram), 0.5, last=True)
    torch.testing.assert_close(last.values, whole.values)
    assert torch.equal(last.keep, whole.keep)


@pytest.mark.parametrize("copies", [2, 4])
def test_columns_that_are_copies_of_each_other(copies: int) -> None:
    target, gram, _ = problem(3, 16, 0)
    group = torch.arange(16)
    group[4 : 4 + copies] = 4
    gram = gram[group][:, group]
    state = begin(target, gram)
    for _ in range(3):
        mask_descent.two_of_four(state, mask_descent.pair_inverses(gram), 0.0)
    assert bool(torch.isfinite(state.values).all())
    assert state.values.abs().max() < 50 * target.abs().max()
    assert bool((state.keep.view(3, 4, 4).sum(2) == 2).all())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 61), (2, 64), (2, 130)])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_a_column_stays_where_it_gains_more_than_the_threshold(rows: int, columns: int, shrink: float) -> None:
    target, gram, inputs = problem(rows, columns, columns)
    state, scores = begin(target, gram), torch.full_like(target, float("nan"))
    mask_descent.columns(state, scores, torch.full((rows,), 0.6), shrink)
    slow, slow_scores = reference.above(target, target, gram, 0.6, shrink)
    expected, gains = sweep_columns(target.double().numpy(), inputs, shrink, threshold=0.6)
    for found, compared in ((state.values, scores), (slow, slow_scores)):
        np.testing.assert_allclose(compared.numpy(), gains, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    carried(state, target)


@pytest.mark.parametrize(("rows", "columns"), [(3, 61), (2, 130)])
def test_where_the_mask_stands_its_columns_get_their_best_values(rows: int, columns: int) -> None:
    target, gram, inputs = problem(rows, columns, columns)
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    state = begin(target, gram, mask)
    mask_descent.columns(state, torch.zeros_like(target), None, 0.0)
    expected, _ = sweep_columns(target.double().numpy(), inputs, 0.0, mask=mask.numpy())
    for found in (state.values, reference.fixed(target, target, gram, mask)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert bool((state.values[~mask] == 0).all())
    carried(state, target)


@pytest.mark.parametrize("size", [1, 2, 17, 5000])
def test_threshold_is_that_of_a_sort(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(size, generator=generator).abs() * torch.logspace(-30, 5, size)
    for kept in sorted({0, 1, size // 3, size // 2, size - 1, size}):
        found = mask_descent.threshold(scores, kept)
        assert found == pytest.approx(reference.threshold(scores, kept), rel=1e-6)
        assert int((scores > found).sum()) == kept


def test_threshold_among_ties_drops_them() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert mask_descent.threshold(scores, 2) == 1.0
    assert mask_descent.threshold(torch.zeros(8), 4) == 0.0


def test_a_device_without_a_kernel_is_named() -> None:
    nowhere = torch.ones(4, 4, device="meta")
    with pytest.raises(HwpqError, match="mask_descent: there is no kernel for the device 'meta'"):
        mask_descent.on_kernel_device(torch.abs, nowhere)
    with pytest.raises(HwpqError, match="no kernel for the device 'meta'"):
        mask_descent.threshold(nowhere, 3)
