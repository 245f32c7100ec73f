"""The CUDA kernel, in Triton: the recurrence as two associative scans over tiles of columns, carried from tile to tile.

A step of an affine recurrence ``s ← a s + b`` is the pair (a, b), and two steps compose to one: ``(a₂a₁, a₂b₁ + b₂)``.
So a tile of columns is scanned by lanes together, and a row needs no lane of its own: a layer has too few rows to fill
a GPU one a lane. A program takes a few rows, a tile of columns at a time, and reads the weight once.

**In place of μ and S** the scans carry, with ``c`` the row's base and ``y = x − c``,

    m = (μ − c) / α:    m ← (1 − α) m + y                d' = y − α m  = (1 − α) d     with m after its own step
    s = (1 − α) S:      s ← (1 − β) s + |d'|             s − |d'|      = (1 − β) · s before the step

which leave out two products a weight and, what matters more, give the state *before* column j from the scan's value at
j: ``keep ⇔ d' ≥ λβ/(1−β) · (s − |d'|)``. Both differences are between numbers of column j itself, so their rounding is
relative to its own distance from the mean; a ``2⁻²³`` of ``|d'|`` is left in the second, so that it is never negative.
The base is the least value of the warm start's first tile: in a row whose values are all equal ``y`` is 0 to the bit,
and all is kept, as the rule says; and where they are not, ``c`` is no outlier whose size would take bits from the rest.

**Rounding at ties.** The order of additions is the scan's, not the reference's, so the mask may differ from it where a
weight lies on the line: only where ``|d − λβS| ≤ TIE · (|x| + |μ| + (1 + |λ|) S)``. The constants 1 − α and 1 − β are
compiled in (a kernel for each pair of gains), for products of constants cost nothing; gains go up to 1/2, since ``d'``
and ``s`` fade to nothing where a gain nears 1. No multiplication is fused into an addition unless the code says so.

Addresses are 64-bit: a row's start is its number times the stride in int64.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains
from hwpq_pipeline.kernels.ewma_select.reference import LOG_A, LOG_B, LOG_C

#: How near the line a weight must lie to fall on another side than the reference's; see above.
TIE = 2.0**-18

#: Gains above it have a CPU kernel only.
LARGEST_GAIN = 0.5

DOMAINS = {"sqrt": 0, "raw": 1, "log": 2}
LARGEST = float(np.finfo(np.float32).max)

#: Most counts that a search for a row's λ makes; it ends before, as the CPU's.
SEARCH_STEPS = 60

#: Ratios that are held at once, in bytes: a search reads them more than once.
SCRATCH = 1 << 28

_A, _B, _C = (tl.constexpr(float(c)) for c in (LOG_A, LOG_B, LOG_C))
#: s − |d'| as s − |d'| (1 − 2⁻²³), which cannot fall below zero by the rounding of s.
_ALMOST = tl.constexpr(-(1 - 2.0**-23))
_LARGEST = tl.constexpr(LARGEST)


class Tile(NamedTuple):
    """A program's share: rows, columns a step (powers of two, eight columns at least), warps, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def default_tile(rows: int) -> Tile:
    """More lanes a row where there are few rows, so that the GPU is filled either way."""
    return Tile(8, 256, 4, 3) if rows < 4096 else Tile(16, 128, 4, 3)


@triton.jit
def _compose(a1, b1, a2, b2):
    """Two steps of ``s ← a s + b`` as one."""
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
    """A tile of values that the mean is taken of: float32, (ROWS, BLOCK); ``there`` are the columns that exist."""
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
    """The recurrence over a tile, from ``carry`` (ROWS,) on: its value after every column, and after the last."""
    place = tl.arange(0, BLOCK)[None, :]
    b = tl.where(place == 0, tl.fma(a, carry[:, None], b), b)
    _, value = tl.associative_scan((a, b), 1, _compose)
    return value, tl.sum(tl.where(place == BLOCK - 1, value, 0.0), 1)


@triton.jit
def _walk(
    x, base, mean, total, there, ALPHA: tl.constexpr, BETA: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile of the recurrence: ``d'``, ``s − |d'|``, and the carries."""
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
    """``(x − μ)/σ`` within ±LARGEST; where σ is 0, +LARGEST if x ≥ μ, else −LARGEST."""
    ratio = tl.minimum(tl.maximum(away * ratio_of_gains / before, -_LARGEST), _LARGEST)
    return tl.where(before > 0, ratio, tl.where(away >= 0, _LARGEST, -_LARGEST))


@triton.jit
def _pass(
    weight, stride, rows, columns, column, row, cross, lam, gains, warm, keep, width, kept, state, ratios,
    ALPHA: tl.constexpr, BETA: tl.constexpr, DOMAIN: tl.constexpr, CROSS: tl.constexpr, RATIOS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows: warm start, then all columns; masks, counts and states, or (``RATIOS``) the ratios.

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
def _search(ratios, columns, drop, best, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """One row's λ below which ``drop`` ratios lie: outwards until bracketed, then between; as `search._search`."""
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


@functools.lru_cache(maxsize=64)
def _warm_table(alpha: float, beta: float, columns: int) -> np.ndarray[Any, Any]:
    """The warm start's gains for m and s, float32, (4, warm); see `_pass`."""
    gain, fade, of_size = warm_gains(alpha, beta, columns)
    rest = 1 - gain
    # |d| = |d'| / rest, whatever the gain; the first value has none (and rest is 0).
    of_away = np.divide((1 - alpha) * of_size, rest, out=np.zeros_like(rest), where=rest > 0)
    return np.stack([rest, gain / alpha, fade, of_away]).astype(np.float32)


class Pass:
    """A layer's weight, factors and options, made ready for the kernels; as `cpu.Pass`.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in).
        column: float32, shape (in,).
        row: float32, shape (out,).
        cross: float32, shape (in,); all zeros for metrics without.
        alpha: gain of μ, in (0, 1/2].
        beta: gain of σ, in (0, 1/2].
        domain: a key of `DOMAINS`.
        tile: how the work is cut; None for the default.

    Raises:
        HwpqError: a gain above `LARGEST_GAIN`.
    """

    def __init__(
        self,
        weight: Tensor,
        column: Tensor,
        row: Tensor,
        cross: Tensor,
        alpha: float,
        beta: float,
        domain: str,
        tile: Tile | None = None,
    ) -> None:
        for name, gain in (("alpha", alpha), ("beta", beta)):
            if gain > LARGEST_GAIN:
                raise HwpqError(
                    f"{name} is {gain}, and the CUDA kernel takes gains up to {LARGEST_GAIN}",
                    where="ewma_select",
                    remedy="Set device to cpu, or choose a smaller gain, for instance 1/64",
                )
        weight = weight.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.to(torch.float32)
        if weight.shape[1] > 1 and weight.stride(1) != 1:
            weight = weight.contiguous()
        self.weight, (self.rows, self.columns) = weight, weight.shape
        self.factors = column, row, cross
        self.crossed = bool(cross.any())
        self.alpha, self.beta, self.domain = float(alpha), float(beta), DOMAINS[domain]
        self.warm = torch.from_numpy(_warm_table(self.alpha, self.beta, self.columns)).to(weight.device)
        self.tile = tile or default_tile(self.rows)

    def select(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(keep, kept, state)`` for the rows' multipliers (out,), as `EwmaPass` describes them."""
        device = self.weight.device
        keep = torch.empty((self.rows, -(-self.columns // 8)), dtype=torch.uint8, device=device)
        kept = torch.empty(self.rows, dtype=torch.int64, device=device)
        state = torch.empty((self.rows, 2), dtype=torch.float32, device=device)
        self._launch(self.weight, self.factors[1], lam, keep, kept, state, None)
        return keep, kept, state

    def matrix(self, first: int = 0, last: int | None = None) -> Tensor:
        """The ratios ``(x − μ)/σ`` of some rows, float32, (rows, in)."""
        part, factor = self.weight[first:last], self.factors[1][first:last]
        ratios = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        self._launch(part, factor, torch.zeros_like(factor), None, None, None, ratios)
        return ratios

    def ratios(self) -> Ratios:
        """The ratios of all rows: for samples."""
        return Ratios(self.matrix())

    def row_multipliers(self, drop: Tensor) -> Tensor:
        """λ of each row such that ``drop`` (int64, (out,)) of its weights go, float32, (out,)."""
        best = torch.empty(self.rows, dtype=torch.float32, device=self.weight.device)
        size = triton.next_power_of_2(self.columns)
        for first, last in self._parts():
            ratios = self.matrix(first, last)
            _search[(last - first,)](
                ratios, self.columns, drop[first:last], best[first:last], SIZE=size, STEPS=SEARCH_STEPS,
                num_warps=max(1, min(32, size // 1024)),
            )  # fmt: skip
        return best

    def dropped(self, multipliers: Tensor) -> Tensor:
        """How many weights of all rows each multiplier drops, int64, (k,)."""
        edges, order = multipliers.sort()
        counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=self.weight.device)
        for first, last in self._parts():
            places = torch.bucketize(self.matrix(first, last).flatten(), edges, right=True, out_int32=True)
            counts += torch.bincount(places, minlength=len(counts))
        below = counts.cumsum(0)[:-1]
        return torch.empty_like(below).scatter_(0, order, below)

    def _parts(self) -> list[tuple[int, int]]:
        """Rows in parts whose ratios fit `SCRATCH`."""
        share = max(1, SCRATCH // (4 * self.columns))
        return [(first, min(first + share, self.rows)) for first in range(0, self.rows, share)]

    def _launch(
        self,
        weight: Tensor,
        factor: Tensor,
        lam: Tensor,
        keep: Tensor | None,
        kept: Tensor | None,
        state: Tensor | None,
        ratios: Tensor | None,
    ) -> None:
        column, _, cross = self.factors
        rows = weight.shape[0]
        stride = weight.stride(0) if rows > 1 else self.columns
        _pass[(triton.cdiv(rows, self.tile.rows),)](
            weight, stride, rows, self.columns, column, factor, cross, lam, self.warm, self.warm.shape[1],
            keep, -(-self.columns // 8), kept, state, ratios,
            ALPHA=self.alpha, BETA=self.beta, DOMAIN=self.domain, CROSS=self.crossed, RATIOS=ratios is not None,
            ROWS=self.tile.rows, BLOCK=self.tile.columns, STAGES=self.tile.stages,
            num_warps=self.tile.warps, enable_fp_fusion=False,
        )  # fmt: skip


class Ratios:
    """As the CPU's `Ratios`, of a sample of rows: sorted once, so that any multiplier is looked up.

    Args:
        values: float32, shape (rows, columns).
    """

    def __init__(self, values: Tensor) -> None:
        self.values, (self.rows, self.columns) = values, values.shape
        self._sorted: Tensor | None = None

    def below(self, multiplier: float) -> Tensor:
        """How many weights of each row are dropped at a multiplier: int64, (rows,)."""
        return (self.values < multiplier).sum(1)

    def multiplier(self, drop: int) -> float:
        """The multiplier at which ``drop`` weights of all rows together are dropped, or as near as repeats allow."""
        if self._sorted is None:
            self._sorted = self.values.flatten().sort().values
        if drop >= self._sorted.numel():
            last = np.float32(self._sorted[-1].item())
            return float(min(np.nextafter(last, np.float32(np.inf)), np.float32(LARGEST)))
        return float(self._sorted[drop])

    def matrix(self) -> Tensor:
        """float32, shape (rows, columns)."""
        return self.values
