"""The CPU kernel: one pass over the weight, sixteen rows side by side, eight columns a step, mask packed on the way.

The time is that of arithmetic, not of memory, so operations are counted: per weight and lane one product for the
contribution, eight for rule and recurrence, three for the mask's bit. What varies by call but not by weight is part of
the compiled type, so that the inner loop holds no branch: the weight's dtype; the domain, which travels as the length of
a tuple (`TAGS`); whether the metric has cross factors (an array, or None).

A block of rows past the end repeats the last row: it writes the same bytes again. A partial octet at a row's end is
copied into a buffer of zeros, and its missing columns get a gain of 0, which leaves μ and σ as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hwpq_pipeline.kernels import flat_rows, jit, over_rows
from hwpq_pipeline.kernels.ewma_select import reference, search
from hwpq_pipeline.kernels.ewma_select.search import LARGEST
from hwpq_pipeline.kernels.lanes import (
    F32,
    I32,
    LANES,
    OCTET,
    TILE,
    absolute,
    constant,
    index,
    lane_pointer,
    load_octet,
    load_splat,
    padded,
    pointer,
    population,
    splat,
    stage,
    vector,
)

Array = np.ndarray[Any, Any]

#: The domain as a type: known when the kernel is compiled.
TAGS = {"sqrt": (0,), "raw": (0, 0), "log": (0, 0, 0)}

RAW, LOG = len(TAGS["raw"]), len(TAGS["log"])

#: Rows of a block's state.
MU, SIGMA, LAMBDA, ROW = range(4)


def _log2(b: Any, z: Any) -> Any:
    """`reference.log2`, lane by lane."""
    bits = b.bitcast(z, vector(I32))
    exponent = b.sitofp(b.sub(b.ashr(bits, constant(I32, 23)), constant(I32, 127)), vector(F32))
    mantissa = b.or_(b.and_(bits, constant(I32, 0x7FFFFF)), constant(I32, 0x3F800000))
    fraction = b.fsub(b.bitcast(mantissa, vector(F32)), constant(F32, 1.0))
    a, slope, curve = (constant(F32, float(c)) for c in (reference.LOG_A, reference.LOG_B, reference.LOG_C))
    correction = b.fadd(a, b.fmul(fraction, b.fadd(slope, b.fmul(fraction, curve))))
    bump = b.fmul(fraction, b.fsub(constant(F32, 1.0), fraction))
    return b.fadd(exponent, b.fadd(fraction, b.fmul(bump, correction)))


def _ratio(b: Any, away: Any, sigma: Any) -> Any:
    """away / sigma within ±LARGEST; where sigma is 0, +LARGEST if away >= 0, else −LARGEST."""
    top, bottom, zero = constant(F32, LARGEST), constant(F32, -LARGEST), constant(F32, 0.0)
    ratio = b.fdiv(away, sigma)
    ratio = b.select(b.fcmp_ordered("<", ratio, top), ratio, top)
    ratio = b.select(b.fcmp_ordered(">", ratio, bottom), ratio, bottom)
    flat = b.select(b.fcmp_ordered(">=", away, zero), top, bottom)
    return b.select(b.fcmp_ordered(">", sigma, zero), ratio, flat)


def _step(b: Any, p: dict[str, Any], bfloat16: bool, domain: int, each: Any) -> None:
    """Run the recurrence over eight columns; ``each(k, away, sigma)`` sees every column before the update."""
    at = [lane_pointer(b, p["state"], index(row * LANES)) for row in range(4)]
    mu, sigma = (b.load(at[row], align=4) for row in (MU, SIGMA))
    for k, size in enumerate(load_octet(b, p["tile"], p["first"], bfloat16)):
        place = b.add(p["column_first"], index(k))
        scale = load_splat(b, p["column"], place)
        if p["cross"] is not None:
            scale = b.fadd(scale, b.fmul(b.load(at[ROW], align=4), load_splat(b, p["cross"], place)))
        x = b.fmul(size, scale)
        if domain == RAW:
            x = b.fmul(x, x)
        elif domain == LOG:
            x = _log2(b, x)
        away = b.fsub(x, mu)
        each(k, away, sigma)
        gain = b.mul(b.add(p["gain_first"], index(k)), index(2 * LANES))
        alpha = b.load(lane_pointer(b, p["gains"], gain), align=4)
        beta = b.load(lane_pointer(b, p["gains"], b.add(gain, index(LANES))), align=4)
        sigma = b.fadd(sigma, b.fmul(beta, b.fsub(absolute(b, away), sigma)))
        mu = b.fadd(mu, b.fmul(alpha, away))
    b.store(mu, at[MU], align=4)
    b.store(sigma, at[SIGMA], align=4)


_NAMES = ("tile", "first", "column", "cross", "column_first", "gains", "gain_first", "state", "tag")


def _unpack(context: Any, b: Any, signature: Any, values: Any) -> tuple[dict[str, Any], list[Any]]:
    """The recurrence's arguments by name, and the others: arrays as addresses, None as None, integers as they are."""
    unpacked = [
        pointer(context, b, kind, value)
        if isinstance(kind, types.Array)
        else (None if kind is types.none else value)
        for kind, value in zip(signature.args, values, strict=True)
    ]
    return dict(zip(_NAMES, unpacked, strict=False)), unpacked[len(_NAMES) :]


@intrinsic  # type: ignore[untyped-decorator]
def _advance(_, tile, first, column, cross, column_first, gains, gain_first, state, tag):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, nothing kept: the warm start."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        arguments, _ = _unpack(context, b, signature, values)
        _step(b, arguments, tile.dtype == types.uint16, len(tag), lambda *_: None)
        return context.get_dummy_value()

    return types.void(tile, first, column, cross, column_first, gains, gain_first, state, tag), generate


@intrinsic  # type: ignore[untyped-decorator]
def _decide(_, tile, first, column, cross, column_first, gains, gain_first, state, tag, words, shift):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence; their keep-bits are or-ed into each lane's word, ``shift`` bits up."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        arguments, (words_at, shift_by) = _unpack(context, b, signature, values)
        lam = b.load(lane_pointer(b, arguments["state"], index(LAMBDA * LANES)), align=4)
        bits = [constant(I32, 0)]

        def decide(k: int, away: Any, sigma: Any) -> None:
            kept = b.fcmp_ordered(">=", away, b.fmul(lam, sigma))
            bits[0] = b.or_(bits[0], b.select(kept, constant(I32, 1 << k), constant(I32, 0)))

        _step(b, arguments, tile.dtype == types.uint16, len(tag), decide)
        place = b.bitcast(words_at, vector(I32).as_pointer())
        moved = b.shl(bits[0], splat(b, b.trunc(shift_by, I32)))
        b.store(b.or_(b.load(place, align=4), moved), place, align=4)
        return context.get_dummy_value()

    arguments = (tile, first, column, cross, column_first, gains, gain_first, state, tag)
    return types.void(*arguments, words, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _count(_, words, counts):  # type: ignore[no-untyped-def]
    """Add each lane's number of ones to its count, and clear the words."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        at = [pointer(context, b, kind, value) for kind, value in zip(signature.args, values, strict=True)]
        words_at, counts_at = (b.bitcast(place, vector(I32).as_pointer()) for place in at)
        ones = population(b, b.load(words_at, align=4))
        b.store(b.add(b.load(counts_at, align=4), ones), counts_at, align=4)
        b.store(constant(I32, 0), words_at, align=4)
        return context.get_dummy_value()

    return types.void(words, counts), generate


@intrinsic  # type: ignore[untyped-decorator]
def _divide(_, tile, first, column, cross, column_first, gains, gain_first, state, tag, ratios, place):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, and the ratio ``(x − μ) / σ`` of each weight, a column's lanes side by side."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        arguments, (ratios_at, place_at) = _unpack(context, b, signature, values)

        def write(k: int, away: Any, sigma: Any) -> None:
            at = b.add(place_at, index(k * LANES))
            b.store(_ratio(b, away, sigma), lane_pointer(b, ratios_at, at), align=4)

        _step(b, arguments, tile.dtype == types.uint16, len(tag), write)
        return context.get_dummy_value()

    arguments = (tile, first, column, cross, column_first, gains, gain_first, state, tag)
    return types.void(*arguments, ratios, types.int64), generate


@jit
def _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile):  # type: ignore[no-untyped-def]
    """Set a block's state: the warm start over the rows' last columns."""
    for lane in range(LANES):
        state[MU * LANES + lane] = 0
        state[SIGMA * LANES + lane] = 0
        state[ROW * LANES + lane] = row[min(block + lane, last - 1)]
    length = warm.shape[0] - OCTET  # it ends with an octet of zero gains, for a partial octet
    for t in range(0, length, TILE):
        c, have = columns - length + t, min(TILE, length - t)
        stage(flat, stride, block, last, c, have, tile)
        for k in range(0, have, OCTET):
            _advance(tile, k, column, cross, c + k, warm, t + k, state, tag)


@jit
def _select(flat, stride, columns, first, last, column, cross, row, lam, warm, gains, tag, keep, kept, states):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``last - 1`` of the mask, their counts and last states."""
    tile, state = np.empty(LANES * TILE, flat.dtype), np.empty(4 * LANES, np.float32)
    words, count = np.zeros(LANES, np.int32), np.empty(LANES, np.int32)
    for block in range(first, last, LANES):
        present = min(LANES, last - block)
        _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile)
        for lane in range(LANES):
            state[LAMBDA * LANES + lane] = lam[min(block + lane, last - 1)]
            count[lane] = 0
        for c in range(0, columns, TILE):
            have = min(TILE, columns - c)
            stage(flat, stride, block, last, c, have, tile)
            for k in range(0, have, OCTET):
                gain = 0 if k + OCTET <= have else OCTET
                _decide(tile, k, column, cross, c + k, gains, gain, state, tag, words, k)
            if have < TILE:
                for lane in range(LANES):
                    words[lane] &= (1 << have) - 1  # no bits for columns that are not there
            for lane in range(present):
                for k in range(0, have, OCTET):
                    keep[block + lane, (c + k) // OCTET] = (words[lane] >> k) & 0xFF
            _count(words, count)
        for lane in range(present):
            kept[block + lane] = count[lane]
            states[block + lane, 0] = state[MU * LANES + lane]
            states[block + lane, 1] = state[SIGMA * LANES + lane]


@jit
def _ratios(flat, stride, columns, first, last, column, cross, row, warm, gains, tag, ratios):  # type: ignore[no-untyped-def]
    """Ratios of rows ``first`` to ``last - 1``: block after block, in each column after column, in each lane by lane.

    ``ratios`` has `search.ratio_size` elements a block; missing columns are filled with `LARGEST`.
    """
    tile, state = np.empty(LANES * TILE, flat.dtype), np.empty(4 * LANES, np.float32)
    place = 0
    for block in range(first, last, LANES):
        _warm_up(flat, stride, columns, block, last, column, cross, row, warm, tag, state, tile)
        for c in range(0, columns, TILE):
            have = min(TILE, columns - c)
            stage(flat, stride, block, last, c, have, tile)
            for k in range(0, have, OCTET):
                gain = 0 if k + OCTET <= have else OCTET
                _divide(tile, k, column, cross, c + k, gains, gain, state, tag, ratios, place + k * LANES)
            place += -(-have // OCTET) * OCTET * LANES
            for k in range(place - (-have % OCTET) * LANES, place):
                ratios[k] = LARGEST


def _splatted(gains: Array) -> Array:
    """(steps, 2) gains, each repeated over the lanes, so that the kernel loads them as vectors; flat."""
    return np.ascontiguousarray(np.repeat(gains.astype(np.float32), LANES, axis=1).reshape(-1))


class Pass:
    """A layer's weight, factors and options, made ready for the compiled functions.

    Args:
        weight: on the CPU, shape (out, in).
        column: float32, shape (in,).
        row: float32, shape (out,).
        cross: float32, shape (in,); all zeros for metrics without.
        warm: the warm start's gains, float32, shape (2, warm).
        alpha: gain of μ.
        beta: gain of σ.
        domain: a key of `TAGS`.
    """

    def __init__(
        self, weight: Tensor, column: Array, row: Array, cross: Array, warm: Array, alpha: float, beta: float, domain: str
    ) -> None:
        self.rows, self.columns = weight.shape
        self.flat, self.stride = flat_rows(weight)
        self.column, self.row = padded(column), row
        self.cross = padded(cross) if cross.any() else None
        self.tag = TAGS[domain]
        self.warm = _splatted(np.concatenate([warm.T, np.zeros((OCTET, 2), np.float32)])).reshape(-1, 2 * LANES)
        # An octet of the gains, then one for a partial octet: its missing columns move nothing.
        gains = np.tile(np.array([alpha, beta], np.float32), (2 * OCTET, 1))
        gains[OCTET + self.columns % OCTET :] = 0
        self.gains = _splatted(gains)

    def select(self, lam: Array) -> tuple[Array, Array, Array]:
        """``(keep, kept, state)`` for the rows' multipliers, as `EwmaPass` describes them."""
        keep = np.empty((self.rows, -(-self.columns // OCTET)), np.uint8)
        kept, states = np.empty(self.rows, np.int64), np.empty((self.rows, 2), np.float32)
        shape, factors = (self.flat, self.stride, self.columns), (self.column, self.cross, self.row)

        def work(first: int, last: int) -> None:
            _select(*shape, first, last, *factors, lam, self.warm, self.gains, self.tag, keep, kept, states)

        over_rows(work, self.rows, self.columns, LANES)
        return keep, kept, states

    def ratios(self) -> Array:
        """The ratios of all rows, in the order that `search` reads."""
        blocks, size = -(-self.rows // LANES), search.ratio_size(self.columns)
        out = np.empty(blocks * size, np.float32)

        def work(first: int, last: int) -> None:
            self._ratios(first, last, out[first // LANES * size :])

        over_rows(work, self.rows, self.columns, LANES)
        return out

    def row_multipliers(self, drop: int) -> Array:
        """λ of each row such that ``drop`` of its weights are dropped, a block of rows at a time: float32, (out,)."""
        lam = np.empty(self.rows, np.float32)

        def work(first: int, last: int) -> None:
            ratios = np.empty(search.ratio_size(self.columns), np.float32)
            for block in range(first, last, LANES):
                end = min(block + LANES, last)
                self._ratios(block, end, ratios)
                search.search_rows(ratios, end - block, self.columns, drop, lam[block:end])

        over_rows(work, self.rows, self.columns, LANES)
        return lam

    def _ratios(self, first: int, last: int, out: Array) -> None:
        shape, factors = (self.flat, self.stride, self.columns), (self.column, self.cross, self.row)
        _ratios(*shape, first, last, *factors, self.warm, self.gains, self.tag, out)
