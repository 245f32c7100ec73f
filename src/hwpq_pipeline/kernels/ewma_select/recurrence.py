"""The inner loop: one octet of columns of the recurrence as vector code, and what each column gives.

What varies by call but not by weight is part of the compiled type, so that the loop holds no branch. This is the
weight's dtype; the domain, which travels as the length of a tuple (`TAGS`); and whether the metric has cross factors
(an array, or None).
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba import types
from numba.extending import intrinsic

from hwpq_pipeline.kernels.ewma_select import LARGEST, reference
from hwpq_pipeline.kernels.lanes import (
    F32,
    I32,
    LANES,
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

#: Parts of a block's state, `LANES` values each: μ; S; λβ, by which S becomes the threshold; the rows' factor.
MU, SUM, BOUND, ROW = range(4)


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


def _octet(b: Any, inputs: list[Any], bfloat16: bool, domain: int) -> Iterator[Any]:
    """Eight columns in the domain, each a vector over the rows.

    Args:
        b: where to emit.
        inputs: address of the staged tile; the octet's first column in it; addresses of the factors `column` and
            `cross` (or None); the octet's first column in them; address of the block's state.
        bfloat16: whether the tile is of bfloat16.
        domain: length of the domain's tag.
    """
    tile, first, column, cross, column_first, state = inputs
    for k, size in enumerate(load_octet(b, tile, first, bfloat16)):
        place = b.add(column_first, index(k))
        scale = load_splat(b, column, place)
        if cross is not None:
            row = b.load(lane_pointer(b, state, index(ROW * LANES)), align=4)
            scale = b.fadd(scale, b.fmul(row, load_splat(b, cross, place)))
        x = b.fmul(size, scale)
        if domain == RAW:
            x = b.fmul(x, x)
        elif domain == LOG:
            x = _log2(b, x)
        yield x


class _State:
    """μ and S of a block, in registers over an octet."""

    def __init__(self, b: Any, state: Any) -> None:
        self.b = b
        self.at = [lane_pointer(b, state, index(row * LANES)) for row in (MU, SUM)]
        self.mu, self.sum = (b.load(place, align=4) for place in self.at)

    def update(self, away: Any, alpha: Any, fade: Any, weight: Any | None = None) -> None:
        """`μ ← μ + α d; S ← fade · S + weight · |d|`; no weight is 1, and a product by 1 changes no bit."""
        b, spread = self.b, absolute(self.b, away)
        spread = spread if weight is None else b.fmul(weight, spread)
        self.sum = b.fadd(b.fmul(fade, self.sum), spread)
        self.mu = b.fadd(self.mu, b.fmul(alpha, away))

    def store(self) -> None:
        """To memory, for the next octet."""
        for value, place in zip((self.mu, self.sum), self.at, strict=True):
            self.b.store(value, place, align=4)


def _gain(b: Any, gains: Any, number: int, step: Any = None) -> Any:
    """One of α, fade and third of the gains, of a step or of all."""
    at = index(number * LANES)
    if step is not None:
        at = b.add(at, b.mul(step, index(3 * LANES)))
    return b.load(lane_pointer(b, gains, at), align=4)


@intrinsic
def advance(_, tile, first, column, cross, column_first, state, tag, gains, step):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, nothing kept, each with gains of its own: the warm start, and rows' ends."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *inputs, _, gains_at, step_at = _values(context, b, signature, values)
        running = _State(b, inputs[-1])
        for k, x in enumerate(_octet(b, inputs, tile.dtype == types.uint16, len(tag))):
            now = b.add(step_at, index(k))
            running.update(b.fsub(x, running.mu), *(_gain(b, gains_at, number, now) for number in range(3)))
        running.store()
        return context.get_dummy_value()

    return types.void(tile, types.int64, column, cross, types.int64, state, tag, gains, types.int64), generate


@intrinsic
def decide(_, tile, first, column, cross, column_first, state, tag, gains, words):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence; their keep-bits are or-ed into each lane's word."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *inputs, _, gains_at, words_at = _values(context, b, signature, values)
        running, bits = _State(b, inputs[-1]), constant(I32, 0)
        bound = b.load(lane_pointer(b, inputs[-1], index(BOUND * LANES)), align=4)
        for k, x in enumerate(_octet(b, inputs, tile.dtype == types.uint16, len(tag))):
            away = b.fsub(x, running.mu)
            kept = b.fcmp_ordered(">=", away, b.fmul(bound, running.sum))
            bits = b.or_(bits, b.select(kept, constant(I32, 1 << k), constant(I32, 0)))
            running.update(away, *(_gain(b, gains_at, number) for number in range(2)))
        place = b.bitcast(words_at, vector(I32).as_pointer())
        moved = b.shl(bits, splat(b, b.trunc(inputs[1], I32)))
        b.store(b.or_(b.load(place, align=4), moved), place, align=4)
        running.store()
        return context.get_dummy_value()

    return types.void(tile, types.int64, column, cross, types.int64, state, tag, gains, words), generate


@intrinsic
def divide(_, tile, first, column, cross, column_first, state, tag, gains, ratios, place):  # type: ignore[no-untyped-def]
    """Eight columns of the recurrence, and the ratio `(x − μ) / σ` of each weight, a column's lanes side by side."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *inputs, _, gains_at, ratios_at, place_at = _values(context, b, signature, values)
        running, beta = _State(b, inputs[-1]), _gain(b, gains_at, 2)
        for k, x in enumerate(_octet(b, inputs, tile.dtype == types.uint16, len(tag))):
            away = b.fsub(x, running.mu)
            at = lane_pointer(b, ratios_at, b.add(place_at, index(k * LANES)))
            b.store(_ratio(b, away, b.fmul(beta, running.sum)), at, align=4)
            running.update(away, *(_gain(b, gains_at, number) for number in range(2)))
        running.store()
        return context.get_dummy_value()

    arguments = (tile, types.int64, column, cross, types.int64, state, tag, gains, ratios, types.int64)
    return types.void(*arguments), generate


@intrinsic
def emit(_, words, counts, keep, places, byte):  # type: ignore[no-untyped-def]
    """Write each lane's word at `byte` of its row, add its ones to the lane's count, clear it."""

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
