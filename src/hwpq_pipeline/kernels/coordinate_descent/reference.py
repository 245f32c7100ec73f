"""The readable version: one row, one column at a time, in float64, the gradient recomputed for each.

For row `w₀` with present values `q`, the quadratic `f(q) = ½ (q − w₀) G (q − w₀)ᵀ` has, along coordinate j, its
minimum at `q_j − ((q − w₀) G)_j / G_jj`; being a parabola there, the best code is the one nearest to it (QuantEase,
Behdin et al. 2023, arXiv 2309.01885, lemma 1).  Along the scale of a group with codes `c` (zero elsewhere) it is at
`s − c·((q − w₀) G) / (c G cᵀ)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.coordinate_descent import TIE, Walk


def objective(values: Tensor, original: Tensor, gram: Tensor) -> Tensor:
    """(out,) float64 `½ (q − w₀) G (q − w₀)ᵀ` of every row."""
    change = values.double() - original.double()
    return 0.5 * ((change @ gram.double()) * change).sum(1)


def descend(
    codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, mask: Tensor | None, walk: Walk
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) float64 and scales (out, groups) float64 after the sweeps; scales may be any float64.

    Args:
        codes: (out, in) where to start, any dtype.
        scale: (out, groups) above zero.
        original: (out, in) the target w₀.
        gram: (in, in) symmetric, positive semi-definite.
        mask: (out, in) bool, False where a code stays as it is; None for nowhere.
        walk: how; what numbers its scales may be does not matter here.
    """
    codes, scale = codes.double().clone(), scale.double().clone()
    original, gram = original.double(), gram.double()
    size = codes.shape[1] // scale.shape[1]
    for row in range(codes.shape[0]):
        for _ in range(walk.sweeps):
            for group in range(scale.shape[1]):
                columns = range(group * size, (group + 1) * size)
                for column in columns:
                    if gram[column, column] > 0 and (mask is None or mask[row, column]):
                        _move_code(codes[row], scale[row], original[row], gram, column, walk)
                if walk.refit:
                    _move_scale(codes[row], scale[row], original[row], gram, group, size)
    return codes, scale


def _values(codes: Tensor, scale: Tensor, size: int) -> Tensor:
    return codes * scale.repeat_interleave(size)


def _move_code(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, column: int, walk: Walk) -> None:
    size = len(codes) // len(scale)
    step = scale[column // size]
    values = _values(codes, scale, size)
    gradient = (values - original) @ gram[:, column]
    target = (values[column] - gradient / gram[column, column]) / step
    target = target.clamp(walk.low, walk.high)
    fresh = _nearest(target, walk)
    if (target - codes[column]).abs() - (target - fresh).abs() > 2 * TIE:
        codes[column] = fresh


def _nearest(target: Tensor, walk: Walk) -> Tensor:
    """The code nearest a number within the grid's limits; halves to even mantissas."""
    if not walk.coarsening:
        return torch.round(target)
    step = 1.0 + (target.abs() > 4) + 2 * (target.abs() > 8)
    return torch.round(target / step) * step


def _move_scale(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor, group: int, size: int) -> None:
    direction = torch.zeros_like(codes)
    direction[group * size : (group + 1) * size] = codes[group * size : (group + 1) * size]
    curvature = direction @ gram @ direction
    slope = direction @ gram @ (_values(codes, scale, size) - original)
    if curvature > 0 and scale[group] - slope / curvature > 0:
        scale[group] -= slope / curvature
