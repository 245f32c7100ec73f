"""The kernels against the readable version, and the threshold against a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.kernels.mask_descent import cpu, reference


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Target and a correlation matrix (ones on the diagonal)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs = inputs + torch.randn(3 * columns, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    gram = inputs.T @ inputs
    root = gram.diagonal().sqrt()
    return torch.randn(rows, columns, generator=generator), gram / root / root[:, None]


def carried(values: Tensor, target: Tensor, gram: Tensor, gradient: Tensor) -> None:
    """The gradient that a kernel carried along is that of the values it left."""
    torch.testing.assert_close(gradient, (values - target) @ gram, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 60), (2, 64), (2, 132)])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_two_of_four_equals_reference(rows: int, columns: int, shrink: float) -> None:
    target, gram = problem(rows, columns, columns)
    values, keep = target.clone(), torch.zeros(target.shape, dtype=torch.bool)
    gradient = torch.zeros_like(target)
    slow = target
    for _ in range(2):
        cpu.two_of_four(values, keep, gradient, gram, cpu.pair_inverses(gram), shrink)
        slow, slow_keep = reference.two_of_four(slow, target, gram, shrink)
    assert torch.equal(keep, slow_keep)
    torch.testing.assert_close(values.double(), slow, rtol=1e-2, atol=1e-3)
    carried(values, target, gram, gradient)


@pytest.mark.parametrize("copies", [2, 4])
def test_columns_that_are_copies_of_each_other(copies: int) -> None:
    target, gram = problem(3, 16, 0)
    group = torch.arange(16)
    group[4 : 4 + copies] = 4
    gram = gram[group][:, group]
    values, keep, gradient = target.clone(), torch.zeros(3, 16, dtype=torch.bool), torch.zeros(3, 16)
    for _ in range(3):
        cpu.two_of_four(values, keep, gradient, gram, cpu.pair_inverses(gram), 0.0)
    assert bool(torch.isfinite(values).all())
    assert values.abs().max() < 50 * target.abs().max()
    assert bool((keep.view(3, 4, 4).sum(2) == 2).all())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 61), (2, 64), (2, 130)])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_free_columns_equal_reference(rows: int, columns: int, shrink: float) -> None:
    target, gram = problem(rows, columns, columns)
    values, scores, gradient = target.clone(), torch.full_like(target, float("nan")), torch.zeros_like(target)
    cpu.columns(values, torch.zeros(0, 0, dtype=torch.bool), scores, gradient, gram, torch.full((rows,), 0.6), shrink)
    slow, slow_scores = reference.above(target, target, gram, 0.6, shrink)
    torch.testing.assert_close(scores.double(), slow_scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(values.double(), slow, rtol=1e-3, atol=1e-4)
    carried(values, target, gram, gradient)


@pytest.mark.parametrize(("rows", "columns"), [(3, 61), (2, 130)])
def test_fixed_columns_equal_reference(rows: int, columns: int) -> None:
    target, gram = problem(rows, columns, columns)
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    values, scores, gradient = target.clone(), torch.zeros_like(target), torch.zeros_like(target)
    cpu.columns(values, mask, scores, gradient, gram, None, 0.0)
    torch.testing.assert_close(values.double(), reference.fixed(target, target, gram, mask), rtol=1e-3, atol=1e-4)
    assert bool((values[~mask] == 0).all())
    carried(values, target, gram, gradient)


@pytest.mark.parametrize("size", [1, 2, 17, 5000])
def test_threshold_is_that_of_a_sort(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(size, generator=generator).abs() * torch.logspace(-30, 5, size)
    for kept in sorted({0, 1, size // 3, size // 2, size - 1, size}):
        found = cpu.threshold(scores, kept)
        assert found == pytest.approx(reference.threshold(scores, kept), rel=1e-6)
        assert int((scores > found).sum()) == kept


def test_threshold_among_ties_drops_them() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert cpu.threshold(scores, 2) == 1.0
    assert cpu.threshold(torch.zeros(8), 4) == 0.0
