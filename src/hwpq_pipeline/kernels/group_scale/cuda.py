"""The CUDA kernel, in Triton: a tile of groups stays in registers while all candidates are tried."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hwpq_pipeline.kernels.group_scale import CANDIDATES, LARGEST_CODE, REFITS, SMALLEST
from hwpq_pipeline.kernels.triton_parts import nearest_code

#: Weights of a program.
TILE = 2048


@triton.jit
def _codes(weights, scale, low, high):
    """The nearest codes; beyond the limits it does not matter how they round."""
    ratio = tl.minimum(tl.maximum(weights * (1.0 / scale)[:, None], low - 1.0), high + 1.0)
    return tl.minimum(tl.maximum(nearest_code(ratio, False), low), high)


@triton.jit
def _error(weights, energy, scale, low, high):
    miss = _codes(weights, scale, low, high) * scale[:, None] - weights
    return tl.sum(energy * (miss * miss), 1)


@triton.jit
def _search(
    grouped, full, importance, result, count, groups, size, low, high, shrink,
    STEPS: tl.constexpr, REFIT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`GROUPS` of all (row, group) pairs, counted along the rows."""
    number = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mine = number < count
    place = tl.arange(0, SIZE)
    there = mine[:, None] & (place < size)[None, :]
    weights = tl.load(grouped + (number * size)[:, None] + place[None, :], mask=there, other=0.0)
    energy = tl.load(importance + ((number % groups) * size)[:, None] + place[None, :], mask=there, other=0.0)
    start = tl.load(full + number, mask=mine, other=1.0)
    best = start
    least = _error(weights, energy, best, low, high)
    for index in range(1, STEPS):
        scale = start * (1.0 - shrink * index)
        error = _error(weights, energy, scale, low, high)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    for _ in range(REFIT):
        codes = _codes(weights, best, low, high)
        numerator = tl.sum(energy * codes * weights, 1)
        denominator = tl.sum(energy * codes * codes, 1)
        sound = (numerator > 0) & (denominator > 0)
        scale = tl.where(sound, numerator / tl.where(sound, denominator, 1.0), best)
        error = _error(weights, energy, scale, low, high)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    tl.store(result + number, best, mask=mine)


def search(grouped: Tensor, full: Tensor, importance: Tensor, low: float, high: float) -> Tensor:
    """(out, groups) float32 scales; arguments as `cpu.search`'s."""
    rows, groups, size = grouped.shape
    result = torch.empty((rows, groups), dtype=torch.float32, device=grouped.device)
    wide = triton.next_power_of_2(size)
    share = max(1, TILE // wide)
    parts = [part.contiguous() for part in (grouped, full, importance)]
    _search[(triton.cdiv(rows * groups, share),)](
        *parts, result, rows * groups, groups, size, low, high, (1.0 - SMALLEST) / (CANDIDATES - 1),
        STEPS=CANDIDATES, REFIT=REFITS, GROUPS=share, SIZE=wide, num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def _choose(
    grouped, candidates, importance, result, count, groups, size, number, most,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`GROUPS` of all (row, group) pairs, counted along the rows."""
    pair = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mine = pair < count
    place = tl.arange(0, SIZE)
    there = mine[:, None] & (place < size)[None, :]
    weights = tl.abs(tl.load(grouped + (pair * size)[:, None] + place[None, :], mask=there, other=0.0))
    energy = tl.load(importance + ((pair % groups) * size)[:, None] + place[None, :], mask=there, other=0.0)
    best = tl.load(candidates + pair * number, mask=mine, other=1.0)
    least = tl.full((GROUPS,), float("inf"), tl.float32)
    for index in range(number):
        scale = tl.load(candidates + pair * number + index, mask=mine, other=1.0)
        ratio = tl.minimum(weights * (1.0 / scale)[:, None], most)
        miss = nearest_code(ratio, True) * scale[:, None] - weights
        error = tl.sum(energy * (miss * miss), 1)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    tl.store(result + pair, best, mask=mine)


def choose(grouped: Tensor, candidates: Tensor, importance: Tensor) -> Tensor:
    """(out, groups) float32; see the package's `choose`."""
    rows, groups, size = grouped.shape
    result = torch.empty((rows, groups), dtype=torch.float32, device=grouped.device)
    wide = triton.next_power_of_2(size)
    share = max(1, TILE // wide)
    parts = [part.contiguous() for part in (grouped, candidates, importance)]
    _choose[(triton.cdiv(rows * groups, share),)](
        *parts, result, rows * groups, groups, size, candidates.shape[2], LARGEST_CODE,
        GROUPS=share, SIZE=wide, num_warps=4,
    )  # fmt: skip
    return result
