"""The CUDA kernel, in Triton: as `cpu`, with a few rows a program and the block's part of the gradient in registers.

There are two levels of blocks. The effect of one block on all other columns is a product (out, 64) × (64, in), whose
time on a GPU is that of reading and writing the gradient. So blocks are gathered to panels of about `PANEL` columns. A
block's product updates its panel alone, and the panel's product updates the rest: the same sums in another order.
Addresses are 64-bit: a row's start is its number times the stride in int64.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from hwpq_pipeline.kernels.coordinate_descent import TIE, Descended, Walk
from hwpq_pipeline.kernels.coordinate_descent.blocks import WIDEST_REFIT, begin, block_columns, objective
from hwpq_pipeline.kernels.triton_parts import nearest_code, with_mantissa

#: Columns of a panel, about; rows and warps of a program.
PANEL, ROWS, WARPS = 512, 8, 2

_MIDPOINT = tl.constexpr(0.5 + TIE)
_MARGIN = tl.constexpr(2 * TIE)


@triton.jit
def _pick(values, here):
    """Of every row the number in the one column that `here` marks."""
    return tl.sum(tl.where(here[None, :], values, 0.0), 1)


@triton.jit
def _moved(now, target, COARSENING: tl.constexpr):
    """The code nearest `target`; the present one if that is hardly farther."""
    fresh = nearest_code(target, COARSENING)
    if COARSENING:
        return tl.where(tl.abs(target - now) - tl.abs(target - fresh) > _MARGIN, fresh, now)
    return tl.where(tl.abs(target - now) > _MIDPOINT, fresh, now)


@triton.jit
def _move_scale(
    code,
    step,
    slope,
    change,
    gram,
    start,
    columns,
    lower,
    upper,
    place,
    real,
    inside,
    bounds_low,
    bounds_high,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """The group's scale takes its minimiser, as far as it can be stored: new scale, slope and change."""
    pushed = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in range(lower, upper):
        line = tl.load(gram + (start + j).to(tl.int64) * columns + start + place, mask=real, other=0.0)
        pushed += _pick(code, place == j)[:, None] * line[None, :]
    own = tl.where(inside[None, :], code, 0.0)
    numerator = tl.sum(own * slope, 1)
    curvature = tl.sum(own * pushed, 1)
    best = step - numerator / tl.where(curvature > 0, curvature, 1.0)
    fresh = with_mantissa(best, DROPPED)
    better = (curvature > 0) & (fresh >= bounds_low) & (fresh <= bounds_high)
    better = better & (tl.abs(fresh - best) < tl.abs(step - best))
    fresh = tl.where(better, fresh, step)
    shift = fresh - step
    return fresh, slope + shift[:, None] * pushed, change + shift[:, None] * own


@triton.jit
def _sweep(
    codes, scale, gradient, mask, moved, gram, inverse, rows, columns, start, block, size, groups, low, high,
    bounds_low, bounds_high,
    MASKED: tl.constexpr, REFIT: tl.constexpr, COARSENING: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move codes and scales of the block that begins at column `start`; `moved` (out, block) gets Q's change."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = number < rows
    number = number.to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < block
    there = mine[:, None] & real[None, :]
    at = (number * columns)[:, None] + (start + place)[None, :]
    slope = tl.load(gradient + at, mask=there, other=0.0)
    code = tl.load(codes + at, mask=there, other=0).to(tl.float32)
    free = there
    if MASKED:
        free = there & (tl.load(mask + at, mask=there, other=0) != 0)
    change = tl.zeros((ROWS, BLOCK), tl.float32)
    width = tl.minimum(size, block)
    for lower in range(0, block, width):
        group = number * groups + (start + lower) // size
        step = tl.load(scale + group, mask=mine, other=1.0)
        per_step = 1.0 / step
        for j in range(lower, lower + width):
            here = place == j
            line = tl.load(gram + (start + j).to(tl.int64) * columns + start + place, mask=real, other=0.0)
            now = _pick(code, here)
            target = now - _pick(slope, here) * tl.load(inverse + start + j) * per_step
            target = tl.minimum(tl.maximum(target, low), high)
            may = tl.sum(tl.where(here[None, :] & free, 1, 0), 1) > 0
            fresh = tl.where(may, _moved(now, target, COARSENING), now)
            shift = step * (fresh - now)
            code = tl.where(here[None, :], fresh[:, None], code)
            change = tl.where(here[None, :], change + shift[:, None], change)
            slope += shift[:, None] * line[None, :]
        if REFIT:
            inside = (place >= lower) & (place < lower + width)
            step, slope, change = _move_scale(
                code, step, slope, change, gram, start, columns, lower, lower + width, place, real, inside,
                bounds_low, bounds_high, BLOCK, ROWS, DROPPED,
            )  # fmt: skip
            tl.store(scale + group, step, mask=mine)
    tl.store(codes + at, code.to(tl.int8), mask=there)
    tl.store(moved + (number * block)[:, None] + place[None, :], change, mask=there)


def descend(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, mask: Tensor | None, walk: Walk) -> Descended:
    """See the package's `descend`."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    size = columns // groups
    codes, scale = codes.clone().contiguous(), scale.clone().contiguous()
    gram = gram.contiguous()
    keep = None if mask is None else mask.contiguous().view(torch.uint8)
    change, gradient, before = begin(codes, scale, original, gram)
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1.0 / torch.where(diagonal > 0, diagonal, 1.0), 0.0).contiguous()
    block = block_columns(columns, size)
    panel = min(columns, max(1, PANEL // block) * block)
    kind = walk.stored
    for _, first in product(range(walk.sweeps), range(0, columns, panel)):
        last = min(first + panel, columns)
        ours = slice(first, last)
        moved = torch.empty((last - first) // block, rows, block, device=codes.device)
        for part, start in zip(moved, range(first, last, block), strict=True):
            _sweep[(triton.cdiv(rows, ROWS),)](
                codes, scale, gradient, keep, part, gram, inverse, rows, columns, start, block, size, groups,
                walk.low, walk.high, kind.least, kind.most,
                MASKED=keep is not None, REFIT=walk.refit and size <= WIDEST_REFIT, COARSENING=walk.coarsening,
                DROPPED=kind.dropped, ROWS=ROWS, BLOCK=triton.next_power_of_2(block), num_warps=WARPS,
            )  # fmt: skip
            gradient[:, ours].addmm_(part, gram[start : start + block, ours])
        whole = moved.permute(1, 0, 2).reshape(rows, -1)
        for rest in (slice(0, first), slice(last, columns)):
            gradient[:, rest].addmm_(whole, gram[ours, rest])
        change[:, ours] += whole
    return Descended(codes, scale, before, objective(change, gradient))
