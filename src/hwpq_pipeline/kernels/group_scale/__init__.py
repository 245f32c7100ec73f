"""The scale of a group of weights that become integers of few bits: `min_s Σ h (s·code(w/s) − w)²`.

`code` rounds to the nearest integer and saturates. The error is piecewise smooth in `s` with many local minima, so
`s` is searched. There are `CANDIDATES` scales, from the one that saturates nothing down to `SMALLEST` times it, and
the first of the best is kept. Then `REFITS` times `s` becomes the closed-form minimiser `Σ h c w / Σ h c²` for the
codes `c` that it gives, where that lowers the error.

Where scales are stored in 8 bits or less, few numbers are scales at all. `choose` then tries those that the caller
lists and keeps the first of the best. Its codes are those of E2M1, the 4-bit float, in halves.

`reference` is the readable oracle (float64 tensors), `cpu` and `cuda` the kernels. Their scales may differ where two
candidates have the same error in float32. Their errors agree.
"""

from __future__ import annotations

from torch import Tensor

from hwpq_pipeline.kernels.devices import wants_cuda

CANDIDATES = 40
REFITS = 2
SMALLEST = 0.25

#: E2M1 in halves.
LARGEST_CODE = 12.0

__all__ = ["CANDIDATES", "LARGEST_CODE", "REFITS", "SMALLEST", "choose", "search"]


def search(grouped: Tensor, full: Tensor, importance: Tensor, low: float, high: float) -> Tensor:
    """(out, groups) float32 scales, on the device that the weights are on.

    Args:
        grouped: (out, groups, size) float32.
        full: (out, groups) float32, the scale that saturates nothing.
        importance: (groups, size) float32, the weight `h` of each column's error.
        low, high: the grid's lowest and highest code.

    Raises:
        HwpqError: a device without a kernel.
    """
    if wants_cuda(grouped, "group_scale"):
        from hwpq_pipeline.kernels.group_scale import cuda as kernel
    else:
        from hwpq_pipeline.kernels.group_scale import cpu as kernel  # type: ignore[no-redef]
    return kernel.search(grouped, full, importance, low, high)


def choose(grouped: Tensor, candidates: Tensor, importance: Tensor) -> Tensor:
    """(out, groups) float32: of each group's candidates the one with the least `Σ h (s·code(w/s) − w)²`.

    Args:
        grouped: (out, groups, size) float32.
        candidates: (out, groups, number) float32, above zero.
        importance: (groups, size) float32, the weight `h` of each column's error.

    Raises:
        HwpqError: a device without a kernel.
    """
    if wants_cuda(grouped, "group_scale"):
        from hwpq_pipeline.kernels.group_scale import cuda as kernel
    else:
        from hwpq_pipeline.kernels.group_scale import cpu as kernel  # type: ignore[no-redef]
    return kernel.choose(grouped, candidates, importance)
