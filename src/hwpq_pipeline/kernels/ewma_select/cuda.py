"""The CUDA kernel, in Triton: the recurrence as two associative scans over tiles of columns, carried from tile to tile.

A step of an affine recurrence `s ← a s + b` is the pair (a, b), and two steps compose to one: `(a₂a₁, a₂b₁ + b₂)`.
So a tile of columns is scanned by lanes together, and a row needs no lane of its own: a layer has too few rows to fill
a GPU one a lane. A program takes a few rows, a tile of columns at a time, and reads the weight once.

**In place of μ and S** the scans carry, with `c` the row's base and `y = x − c`,

    m = (μ − c) / α:    m ← (1 − α) m + y                d' = y − α m  = (1 − α) d     with m after its own step
    s = (1 − α) S:      s ← (1 − β) s + |d'|             s − |d'|      = (1 − β) · s before the step

which leave out two products a weight and, what matters more, give the state *before* column j from the scan's value at
j: `keep ⇔ d' ≥ λβ/(1−β) · (s − |d'|)`. Both differences are between numbers of column j itself, so their rounding is
relative to its own distance from the mean; a `2⁻²³` of `|d'|` is left in the second, so that it is never negative.
The base is the least value of the warm start's first tile: in a row whose values are all equal `y` is 0 to the bit,
and all is kept, as the rule says; and where they are not, `c` is no outlier whose size would take bits from the rest.

**Rounding at ties.** The order of additions is the scan's, not the reference's, so the mask may differ from it where a
weight lies on the line: only where `|d − λβS| ≤ TIE · (|x| + |μ| + (1 + |λ|) S)`. The constants 1 − α and 1 − β are
compiled in (a kernel for each pair of gains), for products of constants cost nothing; gains go up to 1/2, since `d'`
and `s` fade to nothing where a gain nears 1. No multiplication is fused into an addition unless the code says so.

Addresses are 64-bit: a row's start is its number times the stride in int64. `triton_parts` holds what is compiled.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.ewma_select import LARGEST, SEARCH_STEPS, Average, triton_parts
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains

#: How near the line a weight must lie to fall on another side than the reference's; see above.
TIE = 2.0**-18

#: Gains above it have a CPU kernel only.
LARGEST_GAIN = 0.5

#: The domains as the kernel knows them.
_DOMAINS = {"sqrt": 0, "raw": 1, "log": 2}

#: Ratios that are held at once, in bytes: a search reads them more than once.
SCRATCH = 1 << 28


class Tile(NamedTuple):
    """A program's share: rows, columns a step (powers of two, eight columns at least), warps, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def default_tile(rows: int) -> Tile:
    """More lanes a row where there are few rows, so that the GPU is filled either way."""
    return Tile(8, 256, 4, 3) if rows < 4096 else Tile(16, 128, 4, 3)


@functools.lru_cache(maxsize=64)
def _warm_table(alpha: float, beta: float, columns: int) -> np.ndarray[Any, Any]:
    """The warm start's gains for m and s, float32, (4, warm); see `triton_parts.run_pass`."""
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
        average: gains, in (0, 1/2], and domain.
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
        average: Average,
        tile: Tile | None = None,
    ) -> None:
        for name, gain in (("alpha", average.alpha), ("beta", average.beta)):
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
        self.alpha, self.beta, self.domain = float(average.alpha), float(average.beta), _DOMAINS[average.domain]
        self.warm = torch.from_numpy(_warm_table(self.alpha, self.beta, self.columns)).to(weight.device)
        self.tile = tile or default_tile(self.rows)

    def select(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(keep, kept, state)` for the rows' multipliers (out,), as `EwmaPass` describes them."""
        device = self.weight.device
        keep = torch.empty((self.rows, -(-self.columns // 8)), dtype=torch.uint8, device=device)
        kept = torch.empty(self.rows, dtype=torch.int64, device=device)
        state = torch.empty((self.rows, 2), dtype=torch.float32, device=device)
        self._launch(self.weight, self.factors[1], lam, masks=(keep, kept, state))
        return keep, kept, state

    def matrix(self, first: int = 0, last: int | None = None) -> Tensor:
        """The ratios `(x − μ)/σ` of some rows, float32, (rows, in)."""
        part, factor = self.weight[first:last], self.factors[1][first:last]
        ratios = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        self._launch(part, factor, torch.zeros_like(factor), ratios=ratios)
        return ratios

    def ratios(self) -> Ratios:
        """The ratios of all rows: for samples."""
        return Ratios(self.matrix())

    def row_multipliers(self, drop: Tensor) -> Tensor:
        """λ of each row such that `drop` (int64, (out,)) of its weights go, float32, (out,)."""
        best = torch.empty(self.rows, dtype=torch.float32, device=self.weight.device)
        size = triton.next_power_of_2(self.columns)
        for first, last in self._parts():
            ratios = self.matrix(first, last)
            triton_parts.search_row[(last - first,)](
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
        *,
        masks: tuple[Tensor, Tensor, Tensor] | None = None,
        ratios: Tensor | None = None,
    ) -> None:
        """Run the kernel over some rows, into the masks (keep, kept, state) or into the ratios."""
        keep, kept, state = masks or (None, None, None)
        column, _, cross = self.factors
        rows = weight.shape[0]
        stride = weight.stride(0) if rows > 1 else self.columns
        triton_parts.run_pass[(triton.cdiv(rows, self.tile.rows),)](
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
        """The multiplier at which `drop` weights of all rows together are dropped, or as near as repeats allow."""
        if self._sorted is None:
            self._sorted = self.values.flatten().sort().values
        if drop >= self._sorted.numel():
            last = np.float32(self._sorted[-1].item())
            return float(min(np.nextafter(last, np.float32(np.inf)), np.float32(LARGEST)))
        return float(self._sorted[drop])

    def matrix(self) -> Tensor:
        """float32, shape (rows, columns)."""
        return self.values
