"""The inner loops as vector code: contributions laid out by column, the recurrence, and what comes of each column.

What varies by call but not by weight is part of the compiled type, so that the loop holds no branch: the weight's
dtype; the domain, which travels as the length of a tuple (`TAGS`); whether the metric has cross factors (an array, or
None).
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hwpq_pipeline.kernels.ewma_select import reference
from hwpq_pipeline.kernels.ewma_select.search import LARGEST
from hwpq_pipeline.kernels.lanes import (
    F32,
    I8,
    I32,
    LANES,
    OCTET,
    TILE,
    WIDTH,
    absolute,
    constant,
    copy_rows,
    index,
    lane_pointer,
    load_octet,
    load_splat,
    pointer,
    vector,
)

#: The domain as a type: known when the kernel is compiled.
TAGS = {"sqrt": (0,), "raw": (0, 0), "log": (0, 0, 0)}
RAW, LOG = len(TAGS["raw"]), len(TAGS["log"])

#: Rows of a block's state.
MU, SIGMA, LAMBDA, ROW = range(4)

#: First lanes of a block's vectors.
_PARTS = range(0, LANES, WIDTH)


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
    """The ratio away / sigma within ±LARGEST; where sigma is 0, +LARGEST if away >= 0, else −LARGEST."""
    top, bottom, zero = constant(F32, LARGEST), constant(F32, -LARGEST), constant(F32, 0.0)
    ratio = b.fdiv(away, sigma)
    ratio = b.select(b.fcmp_ordered("<", ratio, top), ratio, top)
    ratio = b.select(b.fcmp_ordered(">", ratio, bottom), ratio, bottom)
    flat = b.select(b.fcmp_ordered(">=", away, zero), top, bottom)
    return b.select(b.fcmp_ordered(">", sigma, zero), ratio, flat)


def _values(context: Any, b: Any, signature: Any, values: Any) -> list[Any]:
    """What the intrinsics' code takes: arrays as addresses, None as None, integers as they are."""
    return [
        pointer(context, b, kind, value) if isinstance(kind, types.Array) else (None if kind is types.none else value)
        for kind, value in zip(signature.args, values, strict=True)
    ]


@intrinsic
def spread(_, source, start, stride, column, cross, first, state, tag, group, near, x):  # type: ignore[no-untyped-def]
    """Eight rows of a tile, contributions in the domain, to their lanes of ``x`` (`TILE` columns of `LANES` lanes).

    The rows start at ``source[start]``, ``stride`` apart; their factors at ``column[first]``; their lanes at ``group``.
    They are copied to ``near`` first: rows are often a multiple of 4 KiB apart, and then all want the same few places
    in the first-level cache, so that a line would be fetched again for each of its octets.
    """
    bfloat16, domain = source.dtype == types.uint16, len(tag)

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        source_at, start, stride, column_at, cross_at, first, state_at, _, group, near_at, x_at = _values(
            context, b, signature, values
        )
        copy_rows(b, b.gep(source_at, [start]), stride, near_at)
        row = b.load(lane_pointer(b, state_at, b.add(index(ROW * LANES), group)), align=4)
        for c in range(0, TILE, OCTET):
            octet = load_octet(b, b.gep(near_at, [index(c)]), bfloat16)
            for k, size in enumerate(octet, start=c):
                place = b.add(first, index(k))
                scale = load_splat(b, column_at, place)
                if cross_at is not None:
                    scale = b.fadd(scale, b.fmul(row, load_splat(b, cross_at, place)))
                value = b.fmul(size, scale)
                if domain == RAW:
                    value = b.fmul(value, value)
                elif domain == LOG:
                    value = _log2(b, value)
                b.store(value, lane_pointer(b, x_at, b.add(group, index(k * LANES))), align=4)
        return context.get_dummy_value()

    signature = types.void(
        source, types.int64, types.int64, column, cross, types.int64, state, tag, types.int64, near, x
    )
    return signature, generate


def _step(b: Any, inputs: list[Any], each: Any) -> None:
    """Run the recurrence over eight columns; ``each(k, part, away, sigma)`` sees every vector before its update.

    Args:
        b: where to emit.
        inputs: address of the tile's values; the octet's first column in the tile; address of the gains (for each step
            α, then β, in every lane of a vector); the first step's number; address of the block's state.
        each: emits what is to be done with a vector of lanes.
    """
    x, first, gains, gain, state = inputs
    at = [[lane_pointer(b, state, index(row * LANES + part)) for part in _PARTS] for row in (MU, SIGMA)]
    mu, sigma = ([b.load(place, align=4) for place in places] for places in at)
    for k in range(OCTET):
        alpha = lane_pointer(b, gains, b.mul(b.add(gain, index(k)), index(2 * WIDTH)))
        beta = b.gep(alpha, [index(1)])
        values = b.mul(b.add(first, index(k)), index(LANES))
        for part in range(LANES // WIDTH):
            value = b.load(lane_pointer(b, x, b.add(values, index(part * WIDTH))), align=4)
            away = b.fsub(value, mu[part])
            each(k, part, away, sigma[part])
            # Gains and multipliers are loaded where they are used: held, they would crowd μ and σ out of registers.
            spread_of = b.fsub(absolute(b, away), sigma[part])
            sigma[part] = b.fadd(sigma[part], b.fmul(b.load(beta, align=4), spread_of))
            mu[part] = b.fadd(mu[part], b.fmul(b.load(alpha, align=4), away))
    for places, found in zip(at, (mu, sigma), strict=True):
        for place, value in zip(places, found, strict=True):
            b.store(value, place, align=4)


@intrinsic
def advance(_, x, first, gains, gain, state):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, nothing kept: the warm start."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        _step(b, _values(context, b, signature, values), lambda *_: None)
        return context.get_dummy_value()

    return types.void(x, types.int64, gains, types.int64, state), generate


@intrinsic
def decide(_, x, first, gains, gain, state, marks):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence; a byte of keep-bits for each column and vector of lanes to ``marks``."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *step, marks_at = _values(context, b, signature, values)
        lam = [lane_pointer(b, step[-1], index(LAMBDA * LANES + part)) for part in _PARTS]
        start = b.gep(marks_at, [step[1]])

        def decide(k: int, part: int, away: Any, sigma: Any) -> None:
            kept = b.fcmp_ordered(">=", away, b.fmul(b.load(lam[part], align=4), sigma))
            b.store(b.bitcast(kept, I8), b.gep(start, [index(part * TILE + k)]))

        _step(b, step, decide)
        return context.get_dummy_value()

    return types.void(x, types.int64, gains, types.int64, state, marks), generate


@intrinsic
def divide(_, x, first, gains, gain, state, ratios, place):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, and the ratio ``(x − μ) / σ`` of each weight, a column's lanes side by side."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *step, ratios_at, place_at = _values(context, b, signature, values)

        def write(k: int, part: int, away: Any, sigma: Any) -> None:
            at = b.add(place_at, index(k * LANES + part * WIDTH))
            b.store(_ratio(b, away, sigma), lane_pointer(b, ratios_at, at), align=4)

        _step(b, step, write)
        return context.get_dummy_value()

    return types.void(x, types.int64, gains, types.int64, state, ratios, types.int64), generate


def _words(b: Any, marks: Any) -> Iterator[Any]:
    """Each lane's word of a tile's keep-bits, lane after lane: the marks' bits transposed.

    Of a vector's marks, a byte a column, bit 7 of all makes the word of lane 7; doubled, bit 6 comes to its place.
    """
    bytes_of_tile = ir.VectorType(I8, TILE)
    for part in range(LANES // WIDTH):
        marked = b.bitcast(b.gep(marks, [index(part * TILE)]), bytes_of_tile.as_pointer())
        marked, words = b.load(marked, align=1), []
        for _ in range(WIDTH):
            words.append(b.bitcast(b.icmp_signed("<", marked, ir.Constant(bytes_of_tile, [0] * TILE)), I32))
            marked = b.add(marked, marked)
        yield from reversed(words)


@intrinsic
def emit(_, marks, counts, keep, places, byte):  # type: ignore[no-untyped-def]
    """Write each lane's word of keep-bits at ``byte`` of its row, and add its ones to the lane's count."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        marks_at, counts_at, keep_at, places_at, byte = _values(context, b, signature, values)
        start = b.gep(keep_at, [byte])
        for lane, word in enumerate(_words(b, marks_at)):
            count = b.gep(counts_at, [index(lane)])
            b.store(b.add(b.load(count), b.ctpop(word)), count)
            place = b.gep(start, [b.load(b.gep(places_at, [index(lane)]))])
            b.store(word, b.bitcast(place, I32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(marks, counts, keep, places, types.int64), generate


@intrinsic
def collect(_, marks, words):  # type: ignore[no-untyped-def]
    """Each lane's word of keep-bits to ``words``, for a partial tile."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        marks_at, words_at = _values(context, b, signature, values)
        for lane, word in enumerate(_words(b, marks_at)):
            b.store(word, b.gep(words_at, [index(lane)]))
        return context.get_dummy_value()

    return types.void(marks, words), generate
