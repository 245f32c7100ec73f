"""The inner loop: one octet of columns of the recurrence as vector code, and what to do with each column of it.

What varies by call but not by weight is part of the compiled type, so that the loop holds no branch: the weight's
dtype; the domain, which travels as the length of a tuple (`TAGS`); whether the metric has cross factors (an array, or
None).
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from hwpq_pipeline.kernels.ewma_select import reference
from hwpq_pipeline.kernels.ewma_select.search import LARGEST
from hwpq_pipeline.kernels.lanes import (
    F32,
    I32,
    LANES,
    OCTET,
    absolute,
    constant,
    index,
    lane_number,
    lane_pointer,
    load_octet,
    load_splat,
    pointer,
    population,
    splat,
    vector,
)

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
    """The ratio away / sigma within ±LARGEST; where sigma is 0, +LARGEST if away >= 0, else −LARGEST."""
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
        pointer(context, b, kind, value) if isinstance(kind, types.Array) else (None if kind is types.none else value)
        for kind, value in zip(signature.args, values, strict=True)
    ]
    return dict(zip(_NAMES, unpacked, strict=False)), unpacked[len(_NAMES) :]


@intrinsic
def advance(_, tile, first, column, cross, column_first, gains, gain_first, state, tag):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, nothing kept: the warm start."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        arguments, _ = _unpack(context, b, signature, values)
        _step(b, arguments, tile.dtype == types.uint16, len(tag), lambda *_: None)
        return context.get_dummy_value()

    return types.void(tile, first, column, cross, column_first, gains, gain_first, state, tag), generate


@intrinsic
def decide(_, tile, first, column, cross, column_first, gains, gain_first, state, tag, words, shift):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence; their keep-bits are or-ed into each lane's word, ``shift`` bits up."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        arguments, (words_at, shift_by) = _unpack(context, b, signature, values)
        lam = b.load(lane_pointer(b, arguments["state"], index(LAMBDA * LANES)), align=4)
        bits = [constant(I32, 0)]

        def decide(k: int, away: Any, sigma: Any) -> None:
            kept = b.fcmp_ordered(">=", away, b.fmul(lam, sigma))
            bits[0] = b.or_(bits[0], b.select(kept, constant(I32, 1 << k), constant(I32, 0)))
            if k == OCTET - 1:  # before the state is written: the next octet then finds it in registers
                place = b.bitcast(words_at, vector(I32).as_pointer())
                moved = b.shl(bits[0], splat(b, b.trunc(shift_by, I32)))
                b.store(b.or_(b.load(place, align=4), moved), place, align=4)

        _step(b, arguments, tile.dtype == types.uint16, len(tag), decide)
        return context.get_dummy_value()

    arguments = (tile, first, column, cross, column_first, gains, gain_first, state, tag)
    return types.void(*arguments, words, types.int64), generate


@intrinsic
def emit(_, words, counts, keep, places, byte):  # type: ignore[no-untyped-def]
    """Write each lane's word at ``byte`` of its row, add its ones to the lane's count, clear it."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        at = [pointer(context, b, signature.args[i], values[i]) for i in range(4)]
        words_at, counts_at = (b.bitcast(place, vector(I32).as_pointer()) for place in at[:2])
        bits = b.load(words_at, align=4)
        b.store(b.add(b.load(counts_at, align=4), population(b, bits)), counts_at, align=4)
        b.store(constant(I32, 0), words_at, align=4)
        start = b.gep(at[2], [values[4]])
        for lane in range(LANES):
            place = b.gep(start, [b.load(b.gep(at[3], [index(lane)]))])
            word = b.extract_element(bits, lane_number(lane))
            b.store(word, b.bitcast(place, I32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(words, counts, keep, places, types.int64), generate


@intrinsic
def divide(_, tile, first, column, cross, column_first, gains, gain_first, state, tag, ratios, place):  # type: ignore[no-untyped-def]
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
