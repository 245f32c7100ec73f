"""Coordinate descent over weights and mask together: `min ½ tr((V − V₀) Ĝ (V − V₀)ᵀ)` over sparse `V`.

`Ĝ` (in, in) is the Gram matrix scaled to ones on its diagonal, and `V` is the weight in the scaled variables (see
`compression.refinement`). A sweep walks a row's columns from left to right. With everything else fixed, one part of the
row gets its best values, and the best places for its non-zeros:

- `two_of_four`: a part is an aligned group of four. Each of the six pairs is a 2×2 system with the gain
  `½ b_S Ĥ_S⁻¹ b_Sᵀ`, where `b = v Ĥ − (V − V₀)Ĝ` and `Ĥ` is the group's 4×4 tile. The pair with the highest gain
  stays.
- `columns`: a part is one column. Its best value is `b = v − ((V − V₀)Ĝ)_j`, which gains `½ b²`. With thresholds it
  stays where `|b|` exceeds its row's threshold; without them the mask alone says what stays.

What does not stay is multiplied by `shrink`. A factor of 0 takes it out. A factor in between lets it fade over several
sweeps, in which the rest of the row already makes up for the loss.

`reference` is the readable oracle (float64, one row, the gradient recomputed at every move), `cpu` has the kernels.
There is no `cuda` yet: `on_kernel_device` says where to work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hwpq_pipeline.kernels.devices import Result, on_the_cpu, refuse_cuda

#: The six ways to keep two of four; of equal gains the first stays.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

#: Added to a pair's determinant (at most one), for columns that are copies of each other.
RIDGE = 1e-6

__all__ = ["PAIRS", "RIDGE", "State", "columns", "on_kernel_device", "pair_inverses", "threshold", "two_of_four"]


@dataclass(frozen=True)
class State:
    """A descent under way; sweeps change the first three tensors in place.

    Attributes:
        values: (out, in) float32 V.
        keep: (out, in) bool, what stays.
        gradient: (out, in) float32 (V − V₀)Ĝ.
        gram: (in, in) float32 Ĝ, with ones on its diagonal.
    """

    values: Tensor
    keep: Tensor
    gradient: Tensor
    gram: Tensor


def on_kernel_device(work: Callable[..., Result], *tensors: Tensor) -> Result:
    """`work(*tensors)` on the device that has the kernels below, which is the CPU; results come back.

    Args:
        work: calls the kernels; its result has a `to(device)`.
        tensors: on one device, the CPU or a GPU.

    Raises:
        HwpqError: a device without a kernel.
    """
    return on_the_cpu(work, *tensors, where="mask_descent")


def pair_inverses(gram: Tensor) -> Tensor:
    """(in/4, 6, 3) float32: the inverse [[a, b], [b, c]] of every group and pair, as its entries (a, b, c).

    Args:
        gram: (in, in) float32 with ones on its diagonal; in divisible by 4.

    Raises:
        HwpqError: tensors that are not on the CPU; see `on_kernel_device`.
    """
    refuse_cuda(gram, "mask_descent")
    from hwpq_pipeline.kernels.mask_descent import cpu

    return cpu.pair_inverses(gram)


def two_of_four(state: State, inverses: Tensor, shrink: float, *, last: bool = False) -> None:
    """One sweep over the groups of four, in place in the state.

    Args:
        state: of some rows; in divisible by 4.
        inverses: `pair_inverses(state.gram)`.
        shrink: factor of what does not stay.
        last: no sweep follows; the gradient is left unfinished.

    Raises:
        HwpqError: tensors that are not on the CPU; see `on_kernel_device`.
    """
    refuse_cuda(state.values, "mask_descent")
    from hwpq_pipeline.kernels.mask_descent import cpu

    cpu.two_of_four(state, inverses, shrink, last=last)


def columns(state: State, scores: Tensor, thresholds: Tensor | None, shrink: float, *, last: bool = False) -> None:
    """One sweep over the columns, in place in the state's values and gradient, and in the scores.

    Args:
        state: of some rows; its `keep` is read where `thresholds` is None, and never written.
        scores: (out, in) float32; gets every column's |b|.
        thresholds: (out,) float32: what scores above its row's stays.
        shrink: factor of what does not stay.
        last: no sweep follows; the gradient is left unfinished.

    Raises:
        HwpqError: tensors that are not on the CPU; see `on_kernel_device`.
    """
    refuse_cuda(state.values, "mask_descent")
    from hwpq_pipeline.kernels.mask_descent import cpu

    cpu.columns(state, scores, thresholds, shrink, last=last)


def threshold(scores: Tensor, kept: int) -> float:
    """The number that `kept` scores exceed, but for ties with it; −1 where all are to stay.

    Args:
        scores: float32, contiguous, none negative or NaN.
        kept: how many.

    Raises:
        HwpqError: tensors that are not on the CPU; see `on_kernel_device`.
    """
    refuse_cuda(scores, "mask_descent")
    from hwpq_pipeline.kernels.mask_descent import cpu

    return cpu.threshold(scores, kept)
