"""The kernels: rows on all cores, columns in blocks, the gradient carried along.

A block's moves update the block's own part of the gradient `(V − V₀)Ĝ`, through a tile of `Ĝ` that stays in the
first-level cache. All other columns get theirs from one matrix product a block, as in `kernels.coordinate_descent`. A
sweep costs one (out, in)×(in, in) product, and in the blocks `BLOCK/in` times as many operations again.

`threshold` finds the k-th largest of many scores without a sort: positive floats are ordered as their bits are, so
three counting passes over 11, 10 and 10 of their bits narrow it down exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwpq_pipeline.kernels import over_rows
from hwpq_pipeline.kernels.contracted import jit_contracted
from hwpq_pipeline.kernels.mask_descent import PAIRS, RIDGE, State

BLOCK = 64
#: Rows that a thread takes at once. With fewer, calling the kernel costs more than a fifth of its time.
CHUNK = 96
_FIRST = np.array([pair[0] for pair in PAIRS])
_SECOND = np.array([pair[1] for pair in PAIRS])
_DIGITS = ((20, 11), (10, 10), (0, 10))  # of a positive float's bits: shift and width

Floats = NDArray[np.float32]


@jit_contracted
def _best_pair(wanted: Floats, inverses: Floats) -> int:
    """Index into PAIRS of the pair that gains most; `inverses` (6, 3) are (a, b, c) of a pair's [[a, b], [b, c]]."""
    best, most = 0, np.float32(-1.0)
    for choice in range(6):
        i, j = wanted[_FIRST[choice]], wanted[_SECOND[choice]]
        gain = i * i * inverses[choice, 0] + 2 * i * j * inverses[choice, 1] + j * j * inverses[choice, 2]
        if gain > most:
            best, most = choice, gain
    return best


@jit_contracted
def _two_of_four_rows(
    values: Floats,
    keep: NDArray[np.bool_],
    gradient: Floats,
    moved: Floats,
    tile: Floats,
    inverses: Floats,
    start: int,
    shrink: np.float32,
    first_row: int,
    last_row: int,
) -> None:
    """The groups of the block that begins at column `start`; `moved` (out, block) gets the change of the values."""
    block = tile.shape[0]
    slope = np.empty(block, np.float32)
    wanted, fresh = np.empty(4, np.float32), np.empty(4, np.float32)
    for row in range(first_row, last_row):
        slope[:] = gradient[row, start : start + block]
        for first in range(0, block, 4):
            now = values[row, start + first : start + first + 4]
            for i in range(4):
                wanted[i] = -slope[first + i]
                for j in range(4):
                    wanted[i] += tile[first + i, first + j] * now[j]
            best = _best_pair(wanted, inverses[first // 4])
            one, two = _FIRST[best], _SECOND[best]
            for i in range(4):
                keep[row, start + first + i] = i in (one, two)
                fresh[i] = shrink * now[i]
            fresh[one] = fresh[two] = np.float32(0.0)
            b_one, b_two = wanted[one], wanted[two]
            for i in range(4):
                b_one -= tile[first + one, first + i] * fresh[i]
                b_two -= tile[first + two, first + i] * fresh[i]
            a, b, c = inverses[first // 4, best]
            fresh[one] = a * b_one + b * b_two
            fresh[two] = b * b_one + c * b_two
            for i in range(4):
                fresh[i] -= now[i]
                now[i] += fresh[i]
                moved[row, first + i] = fresh[i]
            for k in range(block):
                slope[k] += (fresh[0] * tile[first, k] + fresh[1] * tile[first + 1, k]) + (
                    fresh[2] * tile[first + 2, k] + fresh[3] * tile[first + 3, k]
                )


@jit_contracted
def _columns_rows(
    values: Floats,
    keep: NDArray[np.bool_],
    scores: Floats,
    gradient: Floats,
    moved: Floats,
    tile: Floats,
    start: int,
    free: bool,
    thresholds: Floats,
    shrink: np.float32,
    first_row: int,
    last_row: int,
) -> None:
    """The columns of a block, one by one: by the row's threshold where `free`, by `keep` where not."""
    block = tile.shape[0]
    slope = np.empty(block, np.float32)
    for row in range(first_row, last_row):
        slope[:] = gradient[row, start : start + block]
        now = values[row, start : start + block]
        for j in range(block):
            best = now[j] - slope[j]
            scores[row, start + j] = abs(best)
            stays = abs(best) > thresholds[row] if free else keep[row, start + j]
            change = best - now[j] if stays else (shrink - np.float32(1.0)) * now[j]
            moved[row, j] = change
            if change != 0:
                now[j] = now[j] + change if stays or shrink != 0 else np.float32(0.0)
                for k in range(block):
                    slope[k] += change * tile[j, k]


def _sweep(state: State, kernel: Callable[[int, Any, Any], Any], *, last: bool) -> None:
    """Run a kernel over all blocks; `kernel(start, tile, moved)` gives the work on a range of rows.

    In the `last` sweep nobody reads the gradient of the columns that are done: half of the product.
    """
    rows, columns = state.values.shape
    gram = state.gram
    for start in range(0, columns, BLOCK):
        width = min(BLOCK, columns - start)
        tile = gram[start : start + width, start : start + width].contiguous().numpy()
        moved = torch.empty(rows, width)
        over_rows(kernel(start, tile, moved.numpy()), rows, width * width, block=CHUNK)
        open_from = start + width if last else 0
        state.gradient[:, open_from:].addmm_(moved, gram[start : start + width, open_from:])


def pair_inverses(gram: Tensor) -> Tensor:
    """See `mask_descent.pair_inverses`."""
    groups = torch.arange(0, gram.shape[0], 4)
    first, second = groups[:, None] + torch.from_numpy(_FIRST), groups[:, None] + torch.from_numpy(_SECOND)
    a, b, c = gram[first, first], gram[first, second], gram[second, second]
    return torch.stack([c, -b, a], 2) / (a * c - b * b + RIDGE)[..., None]


def two_of_four(state: State, inverses: Tensor, shrink: float, *, last: bool = False) -> None:
    """See `mask_descent.two_of_four`."""

    def kernel(start: int, tile: Floats, moved: Floats) -> Any:
        of_block = inverses[start // 4 : (start + tile.shape[0]) // 4].numpy()
        arrays = state.values.numpy(), state.keep.numpy(), state.gradient.numpy(), moved, tile, of_block
        return partial(_two_of_four_rows, *arrays, start, np.float32(shrink))

    _sweep(state, kernel, last=last)


def columns(state: State, scores: Tensor, thresholds: Tensor | None, shrink: float, *, last: bool = False) -> None:
    """See `mask_descent.columns`."""
    free = thresholds is not None
    limits = torch.zeros(state.values.shape[0]) if thresholds is None else thresholds

    def kernel(start: int, tile: Floats, moved: Floats) -> Any:
        arrays = state.values.numpy(), state.keep.numpy(), scores.numpy(), state.gradient.numpy(), moved, tile
        return partial(_columns_rows, *arrays, start, free, limits.numpy(), np.float32(shrink))

    _sweep(state, kernel, last=last)


@jit_contracted
def _count(bits: NDArray[np.int32], above: int, shift: int, digit: int, counts: NDArray[np.int64]) -> None:
    """Count the digits of those numbers whose bits above the digit are `above`."""
    last = (1 << digit) - 1
    for position in range(bits.shape[0]):
        number = bits[position]
        if number >> (shift + digit) == above:
            counts[(number >> shift) & last] += 1


def threshold(scores: Tensor, kept: int) -> float:
    """See `mask_descent.threshold`."""
    if kept >= scores.numel():
        return -1.0
    bits = scores.view(-1).view(torch.int32).numpy()
    found, left = 0, kept
    for shift, digit in _DIGITS:
        counts = np.zeros(1 << digit, np.int64)
        _count(bits, found, shift, digit, counts)
        exceeding = np.cumsum(counts[::-1])[::-1]  # numbers at this digit or higher
        place = int(np.nonzero(exceeding > left)[0][-1])
        left -= int(exceeding[place] - counts[place])
        found = (found << digit) | place
    return float(np.int32(found).view(np.float32))
