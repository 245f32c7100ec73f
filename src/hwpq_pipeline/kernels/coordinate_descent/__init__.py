"""Coordinate descent over codes: `min ½ tr((Q − W₀) G (Q − W₀)ᵀ)` with `q_j = scale · code_j`.

`reference` is the readable oracle (float64), `cpu` and `cuda` are the kernels. All walk through a row's groups in
order. First each column of the group takes the code that minimises the quadratic with all else fixed. Then, if asked,
the group's scale takes its own minimiser. Every move is exact in its coordinate, so the objective never rises.

A code moves only if its target lies past the midpoint to another code, by more than `TIE`, and then to the nearest
one. On a tie the present code stays. The versions agree except where float32 and float64 see the target on different
sides of that line.

Codes are the integers from `low` to `high`, or the *coarsening* ones `0, ±1, ±2, ±3, ±4, ±6, ±8, ±12`: the 4-bit float
E2M1 in halves, whose steps are 1 up to 4, 2 up to 8 and 4 from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hwpq_pipeline.kernels.devices import wants_cuda
from hwpq_pipeline.kernels.stored import FLOAT32, Stored

#: In units of code: how far past the midpoint a target must lie before its code moves.
TIE = 1e-4

__all__ = ["TIE", "Descended", "Walk", "descend"]


@dataclass(frozen=True)
class Walk:
    """How the codes are walked over.

    Attributes:
        low, high: the grid's lowest and highest code.
        sweeps: passes over all columns.
        refit: whether the scales move too.
        stored: the numbers that refitted scales may be.
        coarsening: whether codes are those of E2M1 in halves.
    """

    low: float
    high: float
    sweeps: int
    refit: bool
    stored: Stored = FLOAT32
    coarsening: bool = False


class Descended(NamedTuple):
    """Where the descent ended.

    Attributes:
        codes: (out, in) int8.
        scale: (out, groups) float32.
        before, after: (out,) float32, each row's objective ½ (q − w₀) G (q − w₀)ᵀ.
    """

    codes: Tensor
    scale: Tensor
    before: Tensor
    after: Tensor


def descend(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, mask: Tensor | None, walk: Walk) -> Descended:
    """Walk over the codes (and scales), on the device that the codes are on.

    Args:
        codes: (out, in) int8; left as they are.
        scale: (out, groups) float32 above zero; left as they are.
        original: (out, in) float32 target.
        gram: (in, in) float32.
        mask: (out, in) bool, False where a code stays; None for nowhere.
        walk: how.

    Raises:
        HwpqError: a device without a kernel.
    """
    if wants_cuda(codes, "coordinate_descent"):
        from hwpq_pipeline.kernels.coordinate_descent import cuda as kernel
    else:
        from hwpq_pipeline.kernels.coordinate_descent import cpu as kernel  # type: ignore[no-redef]
    return kernel.descend(codes, scale, original, gram, mask, walk)
