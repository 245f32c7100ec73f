"""Scales: the largest of a group's weights made to fit, or the least squared rounding error.

Where a grid stores its scales in 8 bits (`Grid.stored_as`), only few numbers are scales. Then all of three octaves are
tried: two below the smallest that saturates nothing, and the one above it. Steps of E2M1 are uneven, so that a group
may fit better if its largest weight becomes ±4 and not ±6 (Cook et al. 2025, "Four Over Six", arXiv 2512.02010).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hwpq_pipeline.compression.grids import Grid
from hwpq_pipeline.kernels import group_scale
from hwpq_pipeline.kernels.stored import Stored

_E4M3_MAX, _E4M3_LEAST = 448.0, 2.0**-6  # of its normal numbers
_E4M3_STEPS, _E4M3_LAST = 8, 0x7E  # numbers an octave, which is also the first normal number's bits; the last's bits
_ABOVE, _BELOW = 1, 2  # octaves that are tried
_LARGEST_EXPONENT = 120


def absmax_scale(weight: Tensor, grid: Grid, group: int) -> Tensor:
    """The smallest scales at which no code is clamped.

    Args:
        weight: (out, in) float32.
        grid: with `power_of_two` scales, the scales are rounded up to powers of two.
        group: columns that share a scale.

    Returns:
        (out, groups) float32; 1 for a group of zeros.
    """
    absmax = weight.abs().view(weight.shape[0], -1, group).amax(2)
    scale = absmax / grid.high
    if grid.scale == "power_of_two":
        scale = _power_above(scale)
    return torch.where(absmax > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def _power_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def search_scale(weight: Tensor, grid: Grid, group: int, *, importance: Tensor | None = None) -> Tensor:
    """The scales with the least squared rounding error in their group (see `kernels.group_scale`).

    Args:
        weight: (out, in) float32.
        grid: with integer codes.
        group: columns that share a scale.
        importance: (in,) weight of each column's squared error, for example diag G; None for equal weights.

    Returns:
        (out, groups) float32.
    """
    grouped = weight.reshape(weight.shape[0], -1, group)
    full = absmax_scale(weight, grid, group)
    scale = group_scale.search(grouped, full, _energy(importance, grouped), grid.low, grid.high)
    return scale.clamp_min_(torch.finfo(torch.float32).tiny)


def _energy(importance: Tensor | None, grouped: Tensor) -> Tensor:
    """(groups, size) what each column's squared error counts."""
    shape = grouped.shape[1:]
    if importance is None:
        return torch.ones(shape, device=grouped.device)
    # In units of the mean, so that no square overflows. A little everywhere, for inputs that were never seen.
    mean = importance.float().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (importance.float() / mean + 1e-6).reshape(shape)


def tensor_scale(weight: Tensor, grid: Grid) -> float:
    """The power of two by which scales are multiplied before they are stored; 1 unless they are stored as E4M3.

    With it the largest scale that is tried for any group of `weight` (out, in) lies in the largest octave of E4M3.
    """
    largest = float(weight.abs().max()) / grid.high
    if grid.stored_as != "e4m3" or largest == 0:
        return 1.0
    exponent = math.floor(math.log2(_E4M3_MAX / 2**_ABOVE / largest))
    return 2.0 ** min(max(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)


def stored_numbers(grid: Grid, dtype: torch.dtype, factor: float = 1.0) -> Stored:
    """The numbers that the grid's scales may be.

    Args:
        grid: of the codes.
        dtype: of the dense checkpoint.
        factor: of `tensor_scale`.
    """
    if grid.stored_as == "e4m3":
        return Stored(3, _E4M3_LEAST / factor, _E4M3_MAX / factor)
    if grid.stored_as == "e8m0":
        return Stored(0, 2.0**-_LARGEST_EXPONENT, 2.0**_LARGEST_EXPONENT)
    return Stored.of(dtype)


def choose_scale(weight: Tensor, grid: Grid, group: int, factor: float, *, importance: Tensor | None = None) -> Tensor:
    """As `search_scale`, for a grid whose scales are stored in 8 bits; what is found is such a number.

    Args:
        weight: (out, in) float32.
        grid: stored as `e4m3` or `e8m0`.
        group: columns that share a scale.
        factor: of `tensor_scale`.
        importance: (in,) weight of each column's squared error; None for equal weights.

    Returns:
        (out, groups) float32.
    """
    grouped = weight.reshape(weight.shape[0], -1, group)
    full = absmax_scale(weight, grid, group)
    numbers = stored_numbers(grid, torch.float32, factor)
    if grid.stored_as == "e4m3":
        wanted = (full * factor).clamp(_E4M3_LEAST, _E4M3_MAX)
        nearest = wanted.to(torch.float8_e4m3fn)
        bits = nearest.view(torch.uint8).int() + (nearest.float() < wanted)  # of positive numbers in their order
        steps = torch.arange(_ABOVE * _E4M3_STEPS, -_BELOW * _E4M3_STEPS - 1, -1, device=weight.device)
        ladder = (bits[..., None] + steps).clamp(_E4M3_STEPS, _E4M3_LAST)
        candidates = ladder.to(torch.uint8).view(torch.float8_e4m3fn).float() / factor
    else:
        octaves = torch.arange(_ABOVE, -_BELOW - 1, -1, device=weight.device)
        candidates = (_power_above(full)[..., None] * 2.0**octaves).clamp(numbers.least, numbers.most)
    return group_scale.choose(grouped, candidates, _energy(importance, grouped))
