"""Codes and scales: a weight on a grid as tensors, `w ≈ scale · code`.

Casts to float8 round half to even, but turn a value that is too large into NaN. So values are clamped to the grid's
range first. Zero is a code of every grid, and a zero weight gets it, so a mask survives. A group of zeros has scale 1,
or the nearest that its grid stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwpq_pipeline.compression.grids import Grid

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
        tensor_scale: a power of two; `scale · tensor_scale` is what a grid with a scale for the tensor stores.
    """

    codes: Tensor
    scale: Tensor
    grid: str
    group_size: int | None
    tensor_scale: float = 1.0


def code_dtype(grid: Grid) -> torch.dtype:
    """The dtype that holds the grid's codes."""
    dtype: torch.dtype = getattr(torch, grid.code_dtype)
    return dtype


def on_grid(codes: Tensor, grid: Grid) -> bool:
    """Whether all codes, of the grid's dtype and any shape, lie on the grid; NaN does not."""
    if grid.is_float:
        return not bool(torch.isnan(codes.float()).any())
    if grid.coarsening and not bool((_coarsened(codes.float()) == codes).all()):
        return False
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
    elif grid.coarsening:
        ratio = _coarsened(ratio)
    elif not grid.is_float:
        ratio = ratio.round_()
    return ratio.to(code_dtype(grid))


def _coarsened(values: Tensor) -> Tensor:
    """The nearest numbers of E2M1 in halves, of values up to 12: steps of 1 up to 4, 2 up to 8, 4 from there."""
    size = values.abs()
    step = 1.0 + (size > 4).float() + 2.0 * (size > 8).float()
    return (values / step).round_() * step
