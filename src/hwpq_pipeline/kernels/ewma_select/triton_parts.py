"""The compiled parts of the CUDA kernel: see `cuda` for what they carry and why."""

# The compiler wants flat arguments (a tile's pointers, sizes and carries one by one), and gives them their types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hwpq_pipeline.kernels.ewma_select import LARGEST
from hwpq_pipeline.kernels.ewma_select.reference import LOG_A, LOG_B, LOG_C

_A, _B, _C = (tl.constexpr(float(c)) for c in (LOG_A, LOG_B, LOG_C))
#: s − |d'| as s − |d'| (1 − 2⁻²³), which cannot fall below zero by the rounding of s.
_ALMOST = tl.constexpr(-(1 - 2.0**-23))
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _compose(a1, b1, a2, b2):
    """Two steps of `s ← a s + b` as one."""
    return a1 * a2, tl.fma(a2, b1, b2)


@triton.jit
def _log2(z):
    """`reference.log2`."""
    bits = z.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    correction = fraction * (fraction * _C + _B) + _A
    bump = fraction * (1.0 - fraction)
    return exponent + (fraction + bump * correction)


@triton.jit
def _levels(weight, start, there, column, cross, row_factor, cols, CROSS: tl.constexpr, DOMAIN: tl.constexpr):
    """A tile of values that the mean is taken of: float32, (ROWS, BLOCK); `there` are the columns that exist."""
    w = tl.load(weight + start[:, None] + cols[None, :], mask=there[None, :], other=0.0).to(tl.float32)
    scale = tl.load(column + cols, mask=there, other=0.0)[None, :]
    if CROSS:
        scale = scale + row_factor[:, None] * tl.load(cross + cols, mask=there, other=0.0)[None, :]
    z = tl.abs(w) * scale
    if DOMAIN == 1:
        z = z * z
    if DOMAIN == 2:
        z = _log2(z)
    return z


@triton.jit
def _scan(a, b, carry, BLOCK: tl.constexpr):
    """The recurrence over a tile, from `carry` (ROWS,) on: its value after every column, and after the last."""
    place = tl.arange(0, BLOCK)[None, :]
    b = tl.where(place == 0, tl.fma(a, carry[:, None], b), b)
    _, value = tl.associative_scan((a, b), 1, _compose)
    return value, tl.sum(tl.where(place == BLOCK - 1, value, 0.0), 1)


@triton.jit
def _walk(
    x, base, mean, total, there, ALPHA: tl.constexpr, BETA: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of the recurrence: `d'`, `s − |d'|`, and the carries."""
    y = x - base[:, None]
    a = tl.full(y.shape, 1.0 - ALPHA, tl.float32)
    fade = tl.full(y.shape, 1.0 - BETA, tl.float32)
    b = y
    if not EVEN:  # a column that is not there moves nothing
        a = tl.where(there[None, :], a, 1.0)
        fade = tl.where(there[None, :], fade, 1.0)
        b = tl.where(there[None, :], y, 0.0)
    m, mean = _scan(a, b, mean, BLOCK)
    away = tl.fma(m, -ALPHA, y)
    size = tl.abs(away)
    if not EVEN:
        size = tl.where(there[None, :], size, 0.0)
    s, total = _scan(fade, size, total, BLOCK)
    return away, tl.fma(size, _ALMOST, s), mean, total


@triton.jit
def _decide(away, before, bound, there, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's keep-bits by bytes, and in the bits above a byte how many of its bits are set."""
    keep = away >= bound[:, None] * before
    if not EVEN:
        keep = keep & there[None, :]
    keep = tl.reshape(keep.to(tl.int32), (ROWS, BLOCK // 8, 8))
    value = (1 << tl.arange(0, 8)) + 256
    return tl.sum(keep * value[None, None, :], 2)


@triton.jit
def _divide(away, before, ratio_of_gains):
    """`(x − μ)/σ` within ±LARGEST; where σ is 0, +LARGEST if x ≥ μ, else −LARGEST."""
    ratio = tl.minimum(tl.maximum(away * ratio_of_gains / before, -_LARGEST), _LARGEST)
    return tl.where(before > 0, ratio, tl.where(away >= 0, _LARGEST, -_LARGEST))


@triton.jit
def run_pass(
    weight, stride, rows, columns, column, row, cross, lam, gains, warm, keep, width, kept, state, ratios,
    ALPHA: tl.constexpr, BETA: tl.constexpr, DOMAIN: tl.constexpr, CROSS: tl.constexpr, RATIOS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows: warm start, then all columns; masks, counts and states, or (`RATIOS`) the ratios.

    Args:
        gains: (4, warm) float32: of the warm start, what m is faded by, the weight of y in it, and the same of s.
    """
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = number < rows
    number = tl.minimum(number, rows - 1).to(tl.int64)  # lanes past the last row repeat it
    start = number * stride
    factor = tl.load(row + number)
    place = tl.arange(0, BLOCK)

    there = place < warm
    x = _levels(weight, start, there, column, cross, factor, columns - warm + place, CROSS, DOMAIN)
    base = tl.min(tl.where(there[None, :], x, float("inf")), 1)
    mean = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, warm, BLOCK):
        cols = first + place
        there = cols < warm
        x = _levels(weight, start, there, column, cross, factor, columns - warm + cols, CROSS, DOMAIN)
        y = tl.where(there[None, :], x - base[:, None], 0.0)
        a = tl.load(gains + cols, mask=there, other=1.0)
        g = tl.load(gains + warm + cols, mask=there, other=0.0)
        fade = tl.load(gains + 2 * warm + cols, mask=there, other=1.0)
        h = tl.load(gains + 3 * warm + cols, mask=there, other=0.0)
        m, mean = _scan(tl.broadcast_to(a[None, :], (ROWS, BLOCK)), g[None, :] * y, mean, BLOCK)
        size = h[None, :] * tl.abs(tl.fma(m, -ALPHA, y))
        _, total = _scan(tl.broadcast_to(fade[None, :], (ROWS, BLOCK)), size, total, BLOCK)

    bound = tl.load(lam + number) * BETA / (1.0 - BETA)
    counts = tl.zeros((ROWS, BLOCK // 8), tl.int32)
    bytes_at = tl.arange(0, BLOCK // 8)
    even = columns // BLOCK * BLOCK
    there = place < BLOCK
    for first in tl.range(0, even, BLOCK, num_stages=STAGES):
        x = _levels(weight, start, there, column, cross, factor, first + place, CROSS, DOMAIN)
        away, before, mean, total = _walk(x, base, mean, total, there, ALPHA, BETA, True, BLOCK)
        if RATIOS:
            at = ratios + (number * columns)[:, None] + (first + place)[None, :]
            tl.store(at, _divide(away, before, (1.0 - BETA) / BETA), mask=mine[:, None])
        else:
            found = _decide(away, before, bound, there, True, ROWS, BLOCK)
            counts += found >> 8
            at = keep + (number * width)[:, None] + (first // 8 + bytes_at)[None, :]
            tl.store(at, (found & 255).to(tl.uint8), mask=mine[:, None])
    if even < columns:
        there = even + place < columns
        x = _levels(weight, start, there, column, cross, factor, even + place, CROSS, DOMAIN)
        away, before, mean, total = _walk(x, base, mean, total, there, ALPHA, BETA, False, BLOCK)
        if RATIOS:
            at = ratios + (number * columns)[:, None] + (even + place)[None, :]
            tl.store(at, _divide(away, before, (1.0 - BETA) / BETA), mask=mine[:, None] & there[None, :])
        else:
            found = _decide(away, before, bound, there, False, ROWS, BLOCK)
            counts += found >> 8
            last = even // 8 + bytes_at
            at = keep + (number * width)[:, None] + last[None, :]
            tl.store(at, (found & 255).to(tl.uint8), mask=mine[:, None] & (last < width)[None, :])
    if not RATIOS:
        tl.store(kept + number, tl.sum(counts, 1).to(tl.int64), mask=mine)
        tl.store(state + 2 * number, tl.fma(mean, ALPHA, base), mask=mine)
        tl.store(state + 2 * number + 1, total * (BETA / (1.0 - ALPHA)), mask=mine)


@triton.jit
def search_row(ratios, columns, drop, best, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """One row's λ below which `drop` ratios lie: outwards until bracketed, then between; as `search._search`."""
    number = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    values = tl.load(ratios + number * columns + place, mask=place < columns, other=float("inf"))
    wanted = tl.load(drop + number).to(tl.float32)
    low, high, trial, found = 0.0, 0.0, 0.0, 0.0
    low_count, high_count, error = -1.0, -1.0, float("inf")
    step = 0
    while step < STEPS:
        below = tl.sum((values < trial).to(tl.int32), 0).to(tl.float32)
        miss = tl.abs(below - wanted)
        found = tl.where(miss < error, trial, found)
        error = tl.minimum(miss, error)
        less = below < wanted
        low = tl.where(less, trial, low)
        low_count = tl.where(less, below, low_count)
        high = tl.where(less, high, trial)
        high_count = tl.where(less, high_count, below)
        part = tl.minimum(tl.maximum((wanted - low_count) / tl.maximum(high_count - low_count, 1.0), 0.02), 0.98)
        part = tl.where(step % 3 == 0, 0.5, part)
        between = low * (1.0 - part) + high * part
        outwards = tl.where(
            high_count < 0,
            tl.minimum(tl.maximum(1.0, tl.minimum(tl.abs(low), _LARGEST / 4) * 4), _LARGEST),
            -tl.minimum(tl.maximum(1.0, tl.minimum(tl.abs(high), _LARGEST / 4) * 4), _LARGEST),
        )
        after = tl.where((high_count < 0) | (low_count < 0), outwards, between)
        done = (error == 0) | (tl.abs(trial) >= _LARGEST) | (after == trial)
        step = tl.where(done, STEPS, step + 1)
        trial = after
    tl.store(best + number, found)
