"""The CUDA kernel, in Triton: the CPU's six comparisons on tiles, a byte of the mask from two groups.

The order of operations is the reference's and nothing is fused, so the mask is the reference's to the bit. A program
reads its tile of the weight once and writes its bits. It touches a row's flag only where a contribution is not finite.
Addresses are 64-bit: a row's start is its number times the stride in int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """A program's rows and columns (powers of two, eight columns at least), and its warps."""

    rows: int
    columns: int
    warps: int


DEFAULT = Tile(8, 512, 4)


@triton.jit
def _beats(a, b):
    """1 where the member of lower column wins."""
    return (a >= b).to(tl.int32)


@triton.jit
def _select(
    weight, stride, rows, columns, column, row, cross, keep, width, finite,
    CROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile: bits to `keep`, and a 0 in `finite` (int32) for a row whose contributions are not all finite."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = number < rows
    number = tl.minimum(number, rows - 1).to(tl.int64)  # lanes past the last row repeat it
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = cols < columns
    w = tl.load(weight + (number * stride)[:, None] + cols[None, :], mask=there[None, :], other=0.0).to(tl.float32)
    scale = tl.load(column + cols, mask=there, other=0.0)[None, :]
    if CROSS:
        factor = tl.load(row + number)
        scale = scale + factor[:, None] * tl.load(cross + cols, mask=there, other=0.0)[None, :]
    z = tl.abs(w) * scale
    # As bits, numbers that are not negative are ordered as they are, infinity and NaN last.
    top = tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    tl.atomic_and(finite + number, tl.zeros((ROWS,), tl.int32), mask=mine & (top >= 0x7F800000))

    even, odd = tl.split(tl.reshape(z, (ROWS, BLOCK // 4, 2, 2)))
    m0, m2 = tl.split(even)
    m1, m3 = tl.split(odd)
    b01, b02, b03 = _beats(m0, m1), _beats(m0, m2), _beats(m0, m3)
    b12, b13, b23 = _beats(m1, m2), _beats(m1, m3), _beats(m2, m3)
    k0 = (b01 + b02 + b03) >= 2
    k1 = (1 - b01 + b12 + b13) >= 2
    k2 = (2 - b02 - b12 + b23) >= 2
    k3 = (3 - b03 - b13 - b23) >= 2
    nibble = k0.to(tl.int32) + k1.to(tl.int32) * 2 + k2.to(tl.int32) * 4 + k3.to(tl.int32) * 8
    groups = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    nibble = tl.where((groups * 4 < columns)[None, :], nibble, 0)
    low, high = tl.split(tl.reshape(nibble, (ROWS, BLOCK // 8, 2)))
    place = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    at = keep + (number * width)[:, None] + place[None, :]
    tl.store(at, (low + high * 16).to(tl.uint8), mask=mine[:, None] & (place < width)[None, :])


def select(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, tile: Tile = DEFAULT) -> tuple[Tensor, Tensor]:
    """The packed mask, uint8 (out, ceil(in / 8)), and for each row whether all its contributions are finite.

    Args:
        weight: shape (out, in), in divisible by 4.
        column: float32, shape (in,).
        row: float32, shape (out,).
        cross: float32, shape (in,); all zeros for metrics without.
        tile: how the work is cut.
    """
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.to(torch.float32)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, columns = weight.shape
    width = -(-columns // 8)
    keep = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
    finite = torch.ones(rows, dtype=torch.int32, device=weight.device)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))
    _select[grid](
        weight, weight.stride(0) if rows > 1 else columns, rows, columns, column, row, cross, keep, width, finite,
        CROSS=bool(cross.any()), ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return keep, finite.bool()
