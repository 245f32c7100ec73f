"""Codes and scales: a weight on a grid as tensors, `w ≈ scale · code`.

Casts to float8 round half to even, but turn a value that is too large into NaN. So values are clamped to the grid's
range first. Zero is a code of every grid, and a zero weight gets it, so a mask survives. A group of zeros has scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwpq_pipeline.compression.grids import Grid
from hwpq_pipeline.kernels import group_scale

#: From here up, an E5M2 value within E4M3's range is an E4M3 value; below, E4M3's own steps are fine enough.
E5M2_EXACT_FROM = 2.0**-7


@dataclass(frozen=True)
class Quantized:
    """A weight on a grid.

    Attributes:
        codes: (out, in), of the grid's dtype: int8, or float8_e4m3fn for the FP8 grids.
        scale: (out, groups) float32, finite and above zero; groups = 1 for a scale per output channel.
        grid: a name in `grids.GRIDS`.
        group_size: columns that share a scale; None for all of a row.
    """

    codes: Tensor
    scale: Tensor
    grid: str
    group_size: int | None


def code_dtype(grid: Grid) -> torch.dtype:
    """The dtype that holds the grid's codes."""
    dtype: torch.dtype = getattr(torch, grid.code_dtype)
    return dtype


def on_grid(codes: Tensor, grid: Grid) -> bool:
    """Whether all codes, of the grid's dtype and any shape, lie on the grid; NaN does not."""
    if grid.is_float:
        return not bool(torch.isnan(codes.float()).any())
    return not bool(((codes < grid.low) | (codes > grid.high)).any())


def dequantize(quantized: Quantized) -> Tensor:
    """(out, in) float32 weights, `scale · code`."""
    return scaled(quantized.codes, quantized.scale)


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """`scale · code`.

    Args:
        codes: (out, in), any dtype.
        scale: (out, groups), any float dtype.

    Returns:
        (out, in) float32.
    """
    values = codes.float()
    rows, groups = scale.shape
    return (values.view(rows, groups, -1) * scale.float()[:, :, None]).view(values.shape)


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
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(absmax > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def round_to(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The codes nearest `weight / scale`: halves to even, clamped to the grid's range.

    Args:
        weight: (out, in) float32.
        scale: (out, groups) float32.
        grid: of the codes.

    Returns:
        (out, in) of the grid's dtype.
    """
    rows, groups = scale.shape
    ratio = (weight.view(rows, groups, -1) / scale[:, :, None]).view(weight.shape)
    ratio = ratio.clamp_(grid.low, grid.high)
    if grid.through is not None:
        coarse = ratio.to(getattr(torch, grid.through)).float()
        ratio = torch.where(ratio.abs() < E5M2_EXACT_FROM, ratio, coarse)
    elif not grid.is_float:
        ratio = ratio.round_()
    return ratio.to(code_dtype(grid))


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
    groups = grouped.shape[1]
    full = absmax_scale(weight, grid, group)
    if importance is None:
        energy = torch.ones(groups, group, device=weight.device)
    else:
        # In units of the mean, so that no square overflows. A little everywhere, for inputs that were never seen.
        mean = importance.float().mean().clamp_min(torch.finfo(torch.float32).tiny)
        energy = (importance.float() / mean + 1e-6).reshape(groups, group)
    scale = group_scale.search(grouped, full, energy, grid.low, grid.high)
    return scale.clamp_min_(torch.finfo(torch.float32).tiny)
