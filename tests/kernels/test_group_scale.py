"""The scale-search kernel against the readable float64 version."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.kernels.group_scale import cpu, reference


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (3, 2, 5), (7, 3, 32), (2, 1, 130)])
@pytest.mark.parametrize(("low", "high"), [(-8.0, 7.0), (-4.0, 3.0)])
def test_errors_of_the_scales_agree(rows: int, groups: int, size: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(rows + size)
    grouped = torch.randn(rows, groups, size, generator=generator)
    importance = torch.rand(groups, size, generator=generator) + 0.01
    full = grouped.abs().amax(2) / high
    fast = cpu.search(grouped, full, importance, low, high)
    slow = reference.search(grouped, full, importance, low, high)
    arguments = grouped.double(), importance.double(), low, high
    fast_error = reference.errors(arguments[0], fast.double(), *arguments[1:])
    slow_error = reference.errors(arguments[0], slow, *arguments[1:])
    torch.testing.assert_close(fast_error, slow_error, rtol=0.02, atol=1e-9)
    full_error = reference.errors(arguments[0], full.double(), *arguments[1:])
    assert bool((fast_error <= full_error * (1 + 1e-6)).all())


@pytest.mark.parametrize(("rows", "groups", "size", "number"), [(1, 1, 1, 1), (3, 2, 16, 17), (7, 3, 32, 3)])
def test_the_chosen_scale_has_the_least_error(rows: int, groups: int, size: int, number: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    grouped = torch.randn(rows, groups, size, generator=generator)
    importance = torch.rand(groups, size, generator=generator) + 0.01
    candidates = (grouped.abs().amax(2) / 12)[..., None] * torch.linspace(1.0, 0.25, number)
    found = cpu.choose(grouped, candidates, importance)
    assert torch.equal(found.double(), reference.choose(grouped, candidates, importance))
