"""Coordinate descent over codes: `min ½ tr((Q − W₀) G (Q − W₀)ᵀ)` with `q_j = scale · code_j` on an integer grid.

`reference` is the readable oracle (float64), `cpu` and `cuda` are the kernels. All walk through a row's groups in
order. First each column of the group takes the code that minimises the quadratic with all else fixed. Then, if asked,
the group's scale takes its own minimiser. Every move is exact in its coordinate, so the objective never rises.

A code moves only if its target lies more than half a step (and `TIE` of a step) away from it, and then to the nearest
code. On a tie the present code stays. The versions agree except where float32 and float64 see the target on different
sides of that line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.devices import wants_cuda

TIE = 1e-4
"""Of a step: how far past the midpoint a target must lie before its code moves."""

__all__ = ["TIE", "descend"]


def descend(
    codes: Tensor,
    scale: Tensor,
    original: Tensor,
    gram: Tensor,
    mask: Tensor | None,
    *,
    low: float,
    high: float,
    sweeps: int,
    refit: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, and every row's objective before and after, on the device that the codes are on.

    Args:
        codes: (out, in) int8.
        scale: (out, groups) float32 above zero.
        original: (out, in) float32 target.
        gram: (in, in) float32.
        mask: (out, in) bool, False where a code stays; None for nowhere.
        low, high: the grid's lowest and highest code.
        sweeps: passes over all columns.
        refit: move the scales too.
        scale_dtype: float32, bfloat16 or float16; refitted scales are normal numbers of that type.

    Returns:
        Codes (out, in) int8, scales (out, groups) float32, and (out,) float32 ½ (q − w₀) G (q − w₀)ᵀ before and after.

    Raises:
        HwpqError: a device without a kernel.
    """
    if wants_cuda(codes, "coordinate_descent"):
        from hwpq_pipeline.kernels.coordinate_descent import cuda as kernel
    else:
        from hwpq_pipeline.kernels.coordinate_descent import cpu as kernel  # type: ignore[no-redef]
    return kernel.descend(
        codes, scale, original, gram, mask, low=low, high=high, sweeps=sweeps, refit=refit, scale_dtype=scale_dtype
    )
