"""Grids: the numbers that a compressed weight may take, ``w ≈ scale · code``.

    name       codes                      scale                                       stored as
    fp8_e4m3   E4M3, |code| ≤ 448         absmax/448 per output channel               float8_e4m3fn
    fp8_e5m2   E5M2 ∩ E4M3, |code| ≤ 448  a power of two per output channel           float8_e4m3fn
    int8       −127 … 127                 absmax/127 per channel or group             int8
    int4       −8 … 7                     least squared error, per group (or channel) int8
    int3       −4 … 3                     likewise                                    int8

E5M2 is the paper's grid, and no serving engine reads it.  It has one exponent bit more and one mantissa bit less than
E4M3, so within E4M3's range an E5M2 value is an E4M3 value, down to 2⁻⁷, below which E4M3 becomes subnormal with steps
of 2⁻⁹ (where 1, 2 and 3 steps are E5M2 values too).  With a power-of-two scale that lifts the channel's largest weight
to at most 448, the weights are therefore rounded to E5M2 and stored as E4M3, exactly.

Float8 casts round half to even but turn what is too large into NaN, so they are preceded by saturation.  Zero is a code
of every grid and zero weights get it, so a mask survives.  A group of nothing but zeros has scale one.
For 3 and 4 bits the scale that fits the largest weight wastes codes: it is searched for, see ``search_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import group_scale
from hwpq_pipeline.kernels.fp8 import E4M3_MAX

E5M2_EXACT_FROM = 2.0**-7


@dataclass(frozen=True)
class Grid:
    """A set of codes: the lowest and highest, bits a code, and whether codes are floats or integers."""

    name: str
    bits: int
    low: float
    high: float
    is_float: bool
    code_dtype: torch.dtype


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("fp8_e4m3", 8, -E4M3_MAX, E4M3_MAX, True, torch.float8_e4m3fn),
        Grid("fp8_e5m2", 8, -E4M3_MAX, E4M3_MAX, True, torch.float8_e4m3fn),
        Grid("int8", 8, -127.0, 127.0, False, torch.int8),
        Grid("int4", 4, -8.0, 7.0, False, torch.int8),
        Grid("int3", 3, -4.0, 3.0, False, torch.int8),
    )
}


@dataclass(frozen=True)
class Quantized:
    """A weight on a grid.

    Attributes:
        codes: (out, in) int8, or float8_e4m3fn for the fp8 grids.
        scale: (out, groups) float32, finite and above zero; groups = 1 for a scale per output channel.
        grid: a name in ``GRIDS``.
        group_size: columns that share a scale; None for all of a row.
    """

    codes: Tensor
    scale: Tensor
    grid: str
    group_size: int | None


def find_grid(name: str, where: str) -> Grid:
    """The grid of that name, or an HwpqError that lists those there are."""
    if name not in GRIDS:
        raise HwpqError(f"unknown grid {name!r}", where=where, remedy=f"Choose one of {', '.join(GRIDS)}.")
    return GRIDS[name]


def check_group(columns: int, grid: Grid, group_size: int | None, where: str) -> int:
    """Columns a group, once it is sure that they divide the row.

    Raises:
        HwpqError: a group that does not divide ``columns`` (the remedy names some that do), or one for an fp8 grid.
    """
    if group_size is None:
        return columns
    if grid.is_float:
        raise HwpqError(
            f"{grid.name} takes one scale per output channel, not groups of {group_size}",
            where=where,
            remedy="Leave the group size out.",
        )
    if group_size < 1 or columns % group_size:
        fitting = [size for size in (16, 32, 64, 96, 128, 192, 256) if columns % size == 0]
        fitting = fitting or [size for size in range(1, columns + 1) if columns % size == 0][-4:]
        raise HwpqError(
            f"{columns} columns do not divide into groups of {group_size}",
            where=where,
            remedy=f"Set the group size to one of {', '.join(map(str, fitting))}.",
        )
    return group_size


def dequantize(quantized: Quantized) -> Tensor:
    """(out, in) float32 weights, ``scale · code``."""
    codes = quantized.codes.float()
    rows, groups = quantized.scale.shape
    return (codes.view(rows, groups, -1) * quantized.scale[:, :, None]).view(codes.shape)


def absmax_scale(weight: Tensor, grid: Grid, group: int) -> Tensor:
    """(out, groups) the smallest scale at which no code saturates; a power of two for E5M2; one for zeros."""
    absmax = weight.abs().view(weight.shape[0], -1, group).amax(2)
    scale = absmax / grid.high
    if grid.name == "fp8_e5m2":
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(absmax > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def round_to(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """(out, in) codes nearest ``weight / scale``, halves to even, saturated; dtype ``grid.code_dtype``."""
    rows, groups = scale.shape
    ratio = (weight.view(rows, groups, -1) / scale[:, :, None]).view(weight.shape)
    ratio = ratio.clamp_(grid.low, grid.high)
    if grid.name == "fp8_e5m2":
        coarse = ratio.to(torch.float8_e5m2).float()
        ratio = torch.where(ratio.abs() < E5M2_EXACT_FROM, ratio, coarse)
    elif not grid.is_float:
        ratio = ratio.round_()
    return ratio.to(grid.code_dtype)


def search_scale(weight: Tensor, grid: Grid, group: int, *, importance: Tensor | None = None) -> Tensor:
    """(out, groups) scales of least squared rounding error in their group (see ``kernels.group_scale``).

    Args:
        weight: (out, in) float32.
        grid: an integer grid.
        group: columns that share a scale.
        importance: (in,) weight of each column's squared error, e.g. diag G; None for equal.
    """
    grouped = weight.reshape(weight.shape[0], -1, group)
    groups = grouped.shape[1]
    full = absmax_scale(weight, grid, group)
    if importance is None:
        energy = torch.ones(groups, group, device=weight.device)
    else:
        # in units of its mean, so that no square overflows; a little of it everywhere, for inputs never seen
        mean = importance.float().mean().clamp_min(torch.finfo(torch.float32).tiny)
        energy = (importance.float() / mean + 1e-6).reshape(groups, group)
    scale = group_scale.search(grouped, full, energy, grid.low, grid.high)
    return scale.clamp_min_(torch.finfo(torch.float32).tiny)
