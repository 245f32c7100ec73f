"""Multipliers for a wanted number of dropped weights: counts over stored ratios, never a sort.

A weight is dropped when its ratio `r = (x − μ) / σ` lies below λ. μ and σ do not depend on λ, so once the ratios of
some rows are stored, each trial λ costs one comparison a weight. The search steps outwards until the wanted count is
bracketed, then between (regula falsi, with every third step a bisection). It takes about eight counts in practice.
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from hwpq_pipeline.kernels import jit
from hwpq_pipeline.kernels.ewma_select import LARGEST, SEARCH_STEPS
from hwpq_pipeline.kernels.lanes import I32, LANES, OCTET, index, lane_pointer, pointer, vector

Array = np.ndarray[Any, Any]


def ratio_size(columns: int) -> int:
    """Elements that a block of ratios takes: whole octets of columns, lane by lane."""
    return -(-columns // OCTET) * OCTET * LANES


@intrinsic
def _below(_, ratios, place, lam, first, counts):  # type: ignore[no-untyped-def]
    """Add to each lane's count how many of an octet's eight ratios lie below the lane's multiplier."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        ratios_at, lam_at, counts_at = (pointer(context, b, signature.args[i], values[i]) for i in (0, 2, 4))
        bound = b.load(lane_pointer(b, lam_at, values[3]), align=4)
        place = b.bitcast(b.gep(counts_at, [values[3]]), vector(I32).as_pointer())
        total = b.load(place, align=4)
        for k in range(OCTET):
            ratio = b.load(lane_pointer(b, ratios_at, b.add(values[1], index(k * LANES))), align=4)
            total = b.sub(total, b.sext(b.fcmp_ordered("<", ratio, bound), vector(I32)))
        b.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(ratios, types.int64, lam, types.int64, counts), generate


@jit
def _count_below(ratios, size, rows, lam, counts):  # type: ignore[no-untyped-def]
    """How many of each row's ratios lie below the row's multiplier; lanes past the last row are counted too."""
    for first in range(0, rows, LANES):
        for lane in range(LANES):
            counts[first + lane] = 0
        start = first // LANES * size
        for place in range(start, start + size, OCTET * LANES):
            _below(ratios, place, lam, first, counts)


@jit
def _next(low, high, low_count, high_count, wanted, step):  # type: ignore[no-untyped-def]
    """Where to count next: outwards, four times as far each time, until bracketed (a count of −1: not yet); then
    between, along the straight line through both counts, and every third step in the middle, which the line alone
    would never reach on a bent curve.
    """
    if high_count < 0:
        return min(max(1.0, 4 * abs(low)), LARGEST)
    if low_count < 0:
        return -min(max(1.0, 4 * abs(high)), LARGEST)
    part = 0.5
    if step % 3 != 0 and high_count > low_count:
        part = min(max((wanted - low_count) / (high_count - low_count), 0.02), 0.98)
    return low + part * (high - low)


@jit
def _search(ratios, size, rows, groups, drop, best):  # type: ignore[no-untyped-def]
    """Fill `best`: multipliers below which `drop` ratios lie, of each row (`groups == rows`) or of all (1).

    Args:
        ratios: blocks of ratios.
        size: `ratio_size`.
        rows: how many rows they are of.
        groups: `rows` or 1.
        drop: int64, (groups,).
        best: float32, (groups,).
    """
    whole = (rows + LANES - 1) // LANES * LANES
    trial, counts = np.zeros(whole, np.float32), np.zeros(whole, np.int32)
    # For each group: the bracket's ends, then their counts and the smallest error so far.
    ends, seen = np.zeros((groups, 2)), np.full((groups, 3), -1)
    for step in range(SEARCH_STEPS):
        _count_below(ratios, size, rows, trial, counts)
        unfinished = False
        for g in range(groups):
            below = 0
            for i in range(rows if groups == 1 else 1):
                below += counts[g + i]
            error = abs(below - drop[g])
            if seen[g, 2] < 0 or error < seen[g, 2]:
                best[g] = trial[g]
                seen[g, 2] = error
            side = 0 if below < drop[g] else 1
            ends[g, side] = trial[g]
            seen[g, side] = below
            if seen[g, 2] > 0 and abs(trial[g]) < LARGEST:
                after = np.float32(_next(ends[g, 0], ends[g, 1], seen[g, 0], seen[g, 1], drop[g], step))
                unfinished = unfinished or after != trial[g]
                trial[g] = after
        if not unfinished:
            break
        if groups == 1:
            for i in range(whole):
                trial[i] = trial[0]


@jit
def _ladder(ratios, size, rows, multipliers, totals):  # type: ignore[no-untyped-def]
    """Add to `totals` how many ratios of all rows lie below each of several multipliers."""
    lam, counts = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for first in range(0, rows, LANES):
        block = ratios[first // LANES * size : (first // LANES + 1) * size]
        for m in range(multipliers.shape[0]):
            for lane in range(LANES):
                lam[lane] = multipliers[m]
            _count_below(block, size, LANES, lam, counts)
            for lane in range(min(LANES, rows - first)):
                totals[m] += counts[lane]


def count_ladder(ratios: Array, rows: int, columns: int, multipliers: Array, totals: Array) -> None:
    """Add how many of all the ratios lie below each multiplier, float32 (k,), to `totals`, int64 (k,)."""
    _ladder(ratios, ratio_size(columns), rows, multipliers, totals)


def count_below(ratios: Array, rows: int, columns: int, multiplier: float) -> Array:
    """How many ratios of each row lie below a multiplier, int32, (rows,)."""
    counts = np.zeros(-(-rows // LANES) * LANES, np.int32)
    _count_below(ratios, ratio_size(columns), rows, np.full(counts.shape, multiplier, np.float32), counts)
    return counts[:rows]


def search(ratios: Array, rows: int, columns: int, drop: int) -> float:
    """The multiplier below which `drop` of all the ratios lie, or as near to it as repeated values allow."""
    best = np.zeros(1, np.float32)
    _search(ratios, ratio_size(columns), rows, 1, np.array([drop], np.int64), best)
    return float(best[0])


def search_rows(ratios: Array, rows: int, columns: int, drop: Array, best: Array) -> None:
    """The same for each row apart, `drop` of its own ratios, int64 (rows,); into `best`, float32 (rows,)."""
    if rows == 1:  # a single row is searched as one group: the same thing
        best[0] = search(ratios, 1, columns, int(drop[0]))
        return
    _search(ratios, ratio_size(columns), rows, rows, drop, best)


def matrix(ratios: Array, rows: int, columns: int) -> Array:
    """The ratios as a matrix, float32, (rows, columns)."""
    lanes_last = ratios.reshape(-1, ratio_size(columns) // LANES, LANES)
    return np.ascontiguousarray(lanes_last.transpose(0, 2, 1).reshape(-1, lanes_last.shape[1])[:rows, :columns])
