"""The CPU kernel: one pass over the weight, sixteen rows side by side, eight columns a step, mask packed on the way.

Arithmetic, not memory, sets the time, so operations count. A weight takes one product for the contribution, eight
operations for rule and recurrence, two for the mask's bit (`recurrence`), and three to read and transpose. Lanes past
the last row repeat it: they write the same bytes again. A partial octet at a row's end is filled up with zeros, and a
column that is not there gets a gain of 0, which leaves μ and σ as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.kernels import flat_rows, jit, over_rows
from hwpq_pipeline.kernels.ewma_select import LARGEST, Average, search
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains
from hwpq_pipeline.kernels.ewma_select.recurrence import (
    BOUND,
    MU,
    ROW,
    SUM,
    TAGS,
    advance,
    decide,
    divide,
    emit,
)
from hwpq_pipeline.kernels.lanes import LANES, OCTET, TILE, padded, stage

Array = np.ndarray[Any, Any]


@jit
def _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile):  # type: ignore[no-untyped-def]
    """Set a block's state: the warm start over the rows' last columns."""
    for lane in range(LANES):
        state[MU * LANES + lane] = 0
        state[SUM * LANES + lane] = 0
        state[ROW * LANES + lane] = row[min(block + lane, last - 1)]
    length = warm.shape[0] // (3 * LANES) - OCTET  # it ends with an octet that moves nothing, for a partial octet
    for t in range(0, length, TILE):
        c, have = columns - length + t, min(TILE, length - t)
        stage(flat, stride, block, last, c, have, tile)
        for k in range(0, have, OCTET):
            advance(tile, k, column, cross, c + k, state, tag, warm, t + k)


@jit
def _emit_rest(words, have, counts, keep, places, byte):  # type: ignore[no-untyped-def]
    """`emit` for a partial tile: bytes for the `have` columns that are there, and no bits beyond."""
    for lane in range(LANES):
        word = words[lane] & ((1 << have) - 1)
        words[lane] = 0
        for k in range(have):
            counts[lane] += (word >> k) & 1
        for k in range((have + OCTET - 1) // OCTET):
            keep[places[lane] + byte + k] = (word >> (k * OCTET)) & 0xFF


@jit
def _select(flat, stride, columns, first, last, column, cross, row, bound, warm, gains, ends, tag, keep, kept, states):  # type: ignore[no-untyped-def]
    """Rows `first` to `last - 1` of the mask (`keep` is flat), their counts and last states (μ, S)."""
    tile, words = np.empty(LANES * TILE, flat.dtype), np.zeros(LANES, np.int32)
    state, before = np.empty(4 * LANES, np.float32), np.empty(4 * LANES, np.float32)
    counts, places, width = np.empty(LANES, np.int32), np.empty(LANES, np.int64), (columns + OCTET - 1) // OCTET
    for block in range(first, last, LANES):
        _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile)
        for lane in range(LANES):
            i = min(block + lane, last - 1)
            state[BOUND * LANES + lane] = bound[i]
            places[lane] = i * width
            counts[lane] = 0
        for c in range(0, columns, TILE):
            have = min(TILE, columns - c)
            whole = have // OCTET * OCTET
            stage(flat, stride, block, last, c, have, tile)
            for k in range(0, whole, OCTET):
                decide(tile, k, column, cross, c + k, state, tag, gains, words)
            if whole < have:  # decided as if it were whole, then walked as far as it goes
                before[:] = state
                decide(tile, whole, column, cross, c + whole, state, tag, gains, words)
                state[:] = before
                advance(tile, whole, column, cross, c + whole, state, tag, ends, 0)
            if have == TILE:
                emit(words, counts, keep, places, c // OCTET)
            else:
                _emit_rest(words, have, counts, keep, places, c // OCTET)
        for lane in range(min(LANES, last - block)):
            kept[block + lane] = counts[lane]
            states[block + lane, 0] = state[MU * LANES + lane]
            states[block + lane, 1] = state[SUM * LANES + lane]


@jit
def _ratios(flat, stride, columns, first, last, column, cross, row, warm, gains, tag, ratios):  # type: ignore[no-untyped-def]
    """Ratios of rows `first` to `last - 1`: block after block, in each column after column, in each lane by lane.

    `ratios` has `search.ratio_size` elements a block; missing columns are filled with `LARGEST`.
    """
    tile, state = np.empty(LANES * TILE, flat.dtype), np.empty(4 * LANES, np.float32)
    place = 0
    for block in range(first, last, LANES):
        _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile)
        for c in range(0, columns, TILE):
            have = min(TILE, columns - c)
            stage(flat, stride, block, last, c, have, tile)
            for k in range(0, have, OCTET):
                divide(tile, k, column, cross, c + k, state, tag, gains, ratios, place + k * LANES)
            place += -(-have // OCTET) * OCTET * LANES
            for k in range(place - (-have % OCTET) * LANES, place):
                ratios[k] = LARGEST


@functools.lru_cache(maxsize=64)
def _gains(alpha: float, beta: float, columns: int) -> tuple[Array, Array, Array]:
    """Gains as the inner loops load them: of the warm start, of a row, of its partial octet.

    Each is flat: for every step μ's gain, S's fading and the weight of |d| (of a row: β), each in every lane.
    """
    nothing = np.tile([0.0, 1.0, 0.0], (OCTET, 1))  # moves neither μ nor S
    ends = nothing.copy()
    ends[: columns % OCTET] = (alpha, 1 - beta, 1)
    warm = np.concatenate([warm_gains(alpha, beta, columns).T, nothing])
    of_row = np.array([[alpha, 1 - beta, beta]])
    warm, of_row, ends = (
        np.repeat(steps.astype(np.float32), LANES, axis=1).reshape(-1) for steps in (warm, of_row, ends)
    )
    return warm, of_row, ends


class Ratios:
    """As `ewma_select.Ratios` says; of the CPU's kernel, in the order that `search` reads.

    Args:
        values: float32, blocks of ratios.
        rows: how many rows.
        columns: how many inputs.
    """

    def __init__(self, values: Array, rows: int, columns: int) -> None:
        self.values, self.rows, self.columns = values, rows, columns

    def below(self, multiplier: float) -> Tensor:
        """How many weights of each row are dropped at a multiplier: int64, (rows,)."""
        return torch.from_numpy(search.count_below(self.values, self.rows, self.columns, multiplier)).long()

    def multiplier(self, drop: int) -> float:
        """The multiplier at which `drop` weights of all rows together are dropped, or as near as repeats allow."""
        return search.search(self.values, self.rows, self.columns, drop)

    def matrix(self) -> Tensor:
        """float32, shape (rows, columns)."""
        return torch.from_numpy(search.matrix(self.values, self.rows, self.columns))


class Pass:
    """A layer's weight, factors and options, made ready for the compiled functions.

    Args:
        weight: on the CPU, shape (out, in).
        column: float32, shape (in,).
        row: float32, shape (out,).
        cross: float32, shape (in,); all zeros for metrics without.
        average: gains and domain.
    """

    def __init__(
        self,
        weight: Tensor,
        column: Tensor,
        row: Tensor,
        cross: Tensor,
        average: Average,
    ) -> None:
        self.rows, self.columns = weight.shape
        self.flat, self.stride = flat_rows(weight)
        self.column, self.row = padded(column.numpy()), row.numpy()
        self.cross = padded(cross.numpy()) if cross.any() else None
        self.tag = TAGS[average.domain]
        self.beta = np.float32(average.beta)
        self.warm, self.gains, self.ends = _gains(average.alpha, average.beta, self.columns)

    def select(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(keep, kept, state)` for the rows' multipliers (out,), as `EwmaPass` describes them."""
        keep = np.empty((self.rows, -(-self.columns // OCTET)), np.uint8)
        kept, states = np.empty(self.rows, np.int64), np.empty((self.rows, 2), np.float32)
        shape, factors = (self.flat, self.stride, self.columns), (self.column, self.cross, self.row)
        bound, gains, flat_keep = lam.numpy() * self.beta, (self.warm, self.gains, self.ends), keep.reshape(-1)

        def work(first: int, last: int) -> None:
            _select(*shape, first, last, *factors, bound, *gains, self.tag, flat_keep, kept, states)

        over_rows(work, self.rows, self.columns, LANES)
        states[:, 1] *= self.beta
        return torch.from_numpy(keep), torch.from_numpy(kept), torch.from_numpy(states)

    def ratios(self) -> Ratios:
        """The ratios of all rows."""
        blocks, size = -(-self.rows // LANES), search.ratio_size(self.columns)
        out = np.empty(blocks * size, np.float32)

        def work(first: int, last: int) -> None:
            self._ratios(first, last, out[first // LANES * size :])

        over_rows(work, self.rows, self.columns, LANES)
        return Ratios(out, self.rows, self.columns)

    def row_multipliers(self, drop: Tensor) -> Tensor:
        """λ of each row such that `drop` (int64, (out,)) of its weights go, a block at a time: float32, (out,)."""
        lam, wanted = np.empty(self.rows, np.float32), drop.numpy()

        def work(first: int, last: int) -> None:
            ratios = np.empty(search.ratio_size(self.columns), np.float32)
            for block in range(first, last, LANES):
                end = min(block + LANES, last)
                self._ratios(block, end, ratios)
                search.search_rows(ratios, end - block, self.columns, wanted[block:end], lam[block:end])

        over_rows(work, self.rows, self.columns, LANES)
        return torch.from_numpy(lam)

    def dropped(self, multipliers: Tensor) -> Tensor:
        """How many weights of all rows each multiplier drops, int64, (k,)."""
        starts = range(0, self.rows, LANES)
        rungs = multipliers.numpy()
        totals = np.zeros((len(starts), len(rungs)), np.int64)  # a line a block, so that no two threads share one

        def work(first: int, last: int) -> None:
            ratios = np.empty(search.ratio_size(self.columns), np.float32)
            for block in range(first, last, LANES):
                end = min(block + LANES, last)
                self._ratios(block, end, ratios)
                search.count_ladder(ratios, end - block, self.columns, rungs, totals[block // LANES])

        over_rows(work, self.rows, self.columns, LANES)
        return torch.from_numpy(totals.sum(axis=0))

    def _ratios(self, first: int, last: int, out: Array) -> None:
        shape, factors = (self.flat, self.stride, self.columns), (self.column, self.cross, self.row)
        _ratios(*shape, first, last, *factors, self.warm, self.gains, self.tag, out)
