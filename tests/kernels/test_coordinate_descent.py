"""The kernel against the readable version: the same codes but at near-ties, and the same objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.kernels.coordinate_descent import cpu, reference


def problem(rows: int, columns: int, groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs + torch.randn(4 * columns, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) * 0.2 + 0.2
    codes = (weight / scale.repeat_interleave(columns // groups, 1)).round().clamp(-8, 7).to(torch.int8)
    return weight, inputs.T @ inputs / columns, scale, codes


def values(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 4, 1), (3, 33, 3), (5, 64, 2), (2, 96, 1), (3, 130, 13), (2, 128, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_kernel_equals_reference(rows: int, columns: int, groups: int, masked: bool, refit: bool) -> None:
    weight, gram, scale, codes = problem(rows, columns, groups, seed=rows * columns)
    mask = None
    if masked:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        codes = codes * mask
    limits = {"low": -8.0, "high": 7.0, "sweeps": 2, "refit": refit}
    slow_codes, slow_scale = reference.descend(codes, scale, weight, gram, mask, **limits)
    fast_codes, fast_scale, before, after = cpu.descend(codes, scale, weight, gram, mask, **limits)
    assert (fast_codes == slow_codes).double().mean() >= 0.98  # near-ties may fall to either side, and pull others
    torch.testing.assert_close(fast_scale.double(), slow_scale, rtol=0.02, atol=1e-4)
    slow = reference.objective(values(slow_codes, slow_scale), weight, gram)
    fast = reference.objective(values(fast_codes, fast_scale), weight, gram)
    torch.testing.assert_close(fast, slow, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(after.double(), fast, rtol=1e-3, atol=1e-5)
    start = reference.objective(values(codes, scale), weight, gram)
    torch.testing.assert_close(before.double(), start, rtol=1e-3, atol=1e-5)
    assert bool((fast <= start * (1 + 1e-6)).all())
    if mask is not None:
        assert bool((fast_codes[~mask] == 0).all())


def test_wide_groups_keep_their_scale() -> None:
    weight, gram, scale, codes = problem(2, 2 * cpu.WIDEST_REFIT, 1, seed=3)
    _, fast_scale, before, after = cpu.descend(
        codes, scale, weight, gram, None, low=-8.0, high=7.0, sweeps=1, refit=True
    )
    assert torch.equal(fast_scale, scale)
    assert bool((after < before).all())


@pytest.mark.parametrize(
    ("columns", "size"), [(1, 1), (7, 7), (100, 25), (64, 16), (576, 64), (576, 32), (1536, 128), (1536, 1536), (33, 3)]
)
def test_blocks_cover_the_columns_in_whole_groups(columns: int, size: int) -> None:
    block = cpu.block_columns(columns, size)
    assert columns % block == 0
    assert block % size == 0 or (size > cpu.WIDEST_REFIT and size % block == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_to_the_stored_type(dtype: torch.dtype) -> None:
    weight, gram, scale, codes = problem(4, 32, 2, seed=8)
    scale = scale.to(dtype).float()
    _, fast_scale, before, after = cpu.descend(
        codes, scale, weight, gram, None, low=-8.0, high=7.0, sweeps=3, refit=True, scale_dtype=dtype
    )
    assert torch.equal(fast_scale.to(dtype).float(), fast_scale)
    assert not torch.equal(fast_scale, scale)
    assert bool((after < before).all())


def test_start_is_left_as_it_was() -> None:
    weight, gram, scale, codes = problem(2, 16, 2, seed=4)
    kept = codes.clone(), scale.clone()
    cpu.descend(codes, scale, weight, gram, None, low=-8.0, high=7.0, sweeps=1, refit=True)
    assert torch.equal(codes, kept[0])
    assert torch.equal(scale, kept[1])
