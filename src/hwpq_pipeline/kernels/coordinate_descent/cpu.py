"""The kernel: rows in parallel, columns in blocks, the gradient carried along.

Between moves the kernel keeps the gradient `D = (Q − W₀) G` (out, in): a code that moves by `δ` adds `δ·G_j` to its
row. To do that at once takes `in` reads of a matrix that is too large for the near caches. So the columns are cut into
blocks (of 64, or of a group where that is wider). Inside a block only the block's own part of the gradient is updated,
by the (block, block) tile of `G`, which stays in the first-level cache. All other columns get theirs from one matrix
product `D += Δ @ G[block]`, which BLAS does near peak. A sweep thus costs one (out, in)×(in, in) product and little
else. A plain tensor version walks `in` times over the whole gradient.

A group's scale is refitted inside the block as well: `c·D` and `c G cᵀ` need the group's tile alone. Groups wider than
`WIDEST_REFIT` keep their scale. Scales may be held to a shorter mantissa (bfloat16 in most checkpoints), so that the
codes are chosen for the scale that will be stored.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwpq_pipeline.kernels import over_rows
from hwpq_pipeline.kernels.contracted import jit_contracted
from hwpq_pipeline.kernels.coordinate_descent import TIE, Descended, Walk
from hwpq_pipeline.kernels.coordinate_descent.blocks import WIDEST_REFIT, begin, block_columns, objective
from hwpq_pipeline.kernels.e2m1 import nearest_code


@jit_contracted
def _moved(code: np.float32, target: np.float32, coarsening: bool) -> np.float32:
    """The code nearest `target`, halves to even; the present one if that is hardly farther."""
    if not coarsening:
        return np.rint(target) if abs(target - code) > np.float32(0.5 + TIE) else code
    fresh = nearest_code(target)
    return fresh if abs(target - code) - abs(target - fresh) > np.float32(2 * TIE) else code


@jit_contracted
def _round_mantissa(value: np.float32, dropped: int) -> np.float32:
    """The nearest float32 whose last `dropped` mantissa bits are zero, halves to even."""
    if dropped == 0:
        return value
    bits = np.int64(np.float32(value).view(np.uint32))
    bits += (np.int64(1) << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return np.uint32((bits >> dropped) << dropped).view(np.float32)


@jit_contracted
def _move_codes(
    codes: NDArray[np.int8],
    mask: NDArray[np.bool_],
    step: np.float32,
    slope: NDArray[np.float32],
    change: NDArray[np.float32],
    tile: NDArray[np.float32],
    inverse: NDArray[np.float32],
    columns: tuple[int, int],
    limits: tuple[np.float32, np.float32],
    coarsening: bool,
) -> None:
    """Each code of a group in turn; all arrays are of one row's block, `columns` the group's first and end in it."""
    per_step = np.float32(1.0) / step
    for j in range(columns[0], columns[1]):
        if not mask[j]:
            continue
        code = np.float32(codes[j])
        target = min(max(code - slope[j] * inverse[j] * per_step, limits[0]), limits[1])
        fresh = _moved(code, target, coarsening)
        if fresh != code:
            codes[j] = np.int8(fresh)
            shift = step * (fresh - code)
            change[j] += shift
            for k in range(slope.shape[0]):
                slope[k] += shift * tile[j, k]


@jit_contracted
def _move_scale(
    codes: NDArray[np.int8],
    step: np.float32,
    slope: NDArray[np.float32],
    change: NDArray[np.float32],
    pushed: NDArray[np.float32],
    tile: NDArray[np.float32],
    columns: tuple[int, int],
    stored: tuple[int, float, float],
) -> np.float32:
    """The group's new scale; `stored` are the mantissa bits to drop, and the least and greatest scale."""
    pushed[:] = np.float32(0.0)
    for j in range(columns[0], columns[1]):
        code = np.float32(codes[j])
        if code != 0:
            for k in range(slope.shape[0]):
                pushed[k] += code * tile[j, k]
    numerator = np.float32(0.0)
    curvature = np.float32(0.0)
    for j in range(columns[0], columns[1]):
        numerator += np.float32(codes[j]) * slope[j]
        curvature += np.float32(codes[j]) * pushed[j]
    if curvature <= 0:
        return step
    best = step - numerator / curvature
    fresh = _round_mantissa(best, stored[0])
    if fresh < stored[1] or fresh > stored[2] or abs(fresh - best) >= abs(step - best):
        return step
    shift = fresh - step
    for j in range(columns[0], columns[1]):
        change[j] += shift * np.float32(codes[j])
    for k in range(slope.shape[0]):
        slope[k] += shift * pushed[k]
    return fresh


@jit_contracted
def _sweep_block(
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    gradient: NDArray[np.float32],
    mask: NDArray[np.bool_],
    moved: NDArray[np.float32],
    tile: NDArray[np.float32],
    start: int,
    size: int,
    limits: tuple[np.float32, np.float32],
    coarsening: bool,
    refit: bool,
    stored: tuple[int, float, float],
    first_row: int,
    last_row: int,
) -> None:
    """Move codes and scales of the block that begins at column `start`; `moved` (out, block) gets Q's change.

    `tile` is `G[block, block]`; `size` the group's columns; the rows are `first_row` to `last_row - 1`.
    """
    block = tile.shape[0]
    inverse = np.zeros(block, np.float32)
    for j in range(block):
        if tile[j, j] > 0:
            inverse[j] = np.float32(1.0) / tile[j, j]
    slope = np.empty(block, np.float32)
    pushed = np.empty(block, np.float32)
    width = min(size, block)
    for row in range(first_row, last_row):
        slope[:] = gradient[row, start : start + block]
        change = moved[row]
        change[:] = np.float32(0.0)
        row_codes, row_mask = codes[row, start : start + block], mask[row, start : start + block]
        for first in range(0, block, width):
            columns = (first, first + width)
            step = scale[row, (start + first) // size]
            _move_codes(row_codes, row_mask, step, slope, change, tile, inverse, columns, limits, coarsening)
            if refit:
                step = _move_scale(row_codes, step, slope, change, pushed, tile, columns, stored)
                scale[row, (start + first) // size] = step


def descend(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, mask: Tensor | None, walk: Walk) -> Descended:
    """See the package's `descend`."""
    rows, columns = codes.shape
    size = columns // scale.shape[1]
    codes, scale = codes.clone().contiguous(), scale.clone().contiguous()
    keep = torch.ones(codes.shape, dtype=torch.bool) if mask is None else mask.contiguous()
    change, gradient, before = begin(codes, scale, original, gram)
    block = block_columns(columns, size)
    moved = torch.empty(rows, block)
    views = [part.numpy() for part in (codes, scale, gradient, keep, moved)]
    limits = np.float32(walk.low), np.float32(walk.high)
    stored = walk.stored.dropped, walk.stored.least, walk.stored.most
    kind = limits, walk.coarsening, walk.refit and size <= WIDEST_REFIT
    for _ in range(walk.sweeps):
        for start in range(0, columns, block):
            tile = gram[start : start + block, start : start + block].contiguous().numpy()
            over_rows(partial(_sweep_block, *views, tile, start, size, *kind, stored), rows, block * block)
            gradient.addmm_(moved, gram[start : start + block])
            change[:, start : start + block] += moved
    return Descended(codes, scale, before, objective(change, gradient))
