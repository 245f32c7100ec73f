"""The readable version, all groups at once in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.group_scale import CANDIDATES, LARGEST_CODE, REFITS, SMALLEST


def errors(grouped: Tensor, scale: Tensor, importance: Tensor, low: float, high: float) -> Tensor:
    """(out, groups) Σ h (s·code − w)² of `grouped` (out, groups, size) at `scale` (out, groups).

    `importance` is (groups, size).
    """
    codes = (grouped / scale[..., None]).round().clamp(low, high)
    return (importance * (codes * scale[..., None] - grouped).square()).sum(-1)


def search(grouped: Tensor, full: Tensor, importance: Tensor, low: float, high: float) -> Tensor:
    """(out, groups) float64 scales; `full` (out, groups) is the scale that saturates nothing."""
    grouped, full, importance = grouped.double(), full.double(), importance.double()
    best = full.clone()
    least = errors(grouped, best, importance, low, high)
    for index in range(1, CANDIDATES):
        scale = full * (1.0 - (1.0 - SMALLEST) * index / (CANDIDATES - 1))
        error = errors(grouped, scale, importance, low, high)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    for _ in range(REFITS):
        codes = (grouped / best[..., None]).round().clamp(low, high)
        numerator = (importance * codes * grouped).sum(-1)
        denominator = (importance * codes.square()).sum(-1)
        scale = torch.where((numerator > 0) & (denominator > 0), numerator / denominator, best)
        error = errors(grouped, scale, importance, low, high)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def choose(grouped: Tensor, candidates: Tensor, importance: Tensor) -> Tensor:
    """(out, groups) float64; see the package's `choose`."""
    half = torch.tensor([0, 1, 2, 3, 4, 6, 8, LARGEST_CODE], dtype=torch.float64)
    codes = torch.cat([-half.flip(0), half])
    ratio = grouped.double()[..., None, :] / candidates.double()[..., None]
    nearest = codes[(ratio[..., None] - codes).abs().argmin(-1)]
    miss = (nearest - ratio) * candidates.double()[..., None]
    best = (importance.double()[:, None, :] * miss.square()).sum(-1).argmin(-1, keepdim=True)
    return candidates.double().gather(-1, best)[..., 0]
