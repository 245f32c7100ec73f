"""The kernel: a group's weights stay in the first-level cache while all candidates are tried; rows in parallel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwpq_pipeline.kernels import over_rows
from hwpq_pipeline.kernels.contracted import jit_contracted
from hwpq_pipeline.kernels.e2m1 import nearest_code
from hwpq_pipeline.kernels.group_scale import CANDIDATES, LARGEST_CODE, REFITS, SMALLEST


@jit_contracted
def _error(
    weights: NDArray[np.float32],
    importance: NDArray[np.float32],
    scale: np.float32,
    low: np.float32,
    high: np.float32,
) -> np.float32:
    inverse = np.float32(1.0) / scale
    total = np.float32(0.0)
    for j in range(weights.shape[0]):
        code = min(max(np.rint(weights[j] * inverse), low), high)
        miss = code * scale - weights[j]
        total += importance[j] * (miss * miss)
    return total


@jit_contracted
def _search_rows(
    grouped: NDArray[np.float32],
    full: NDArray[np.float32],
    importance: NDArray[np.float32],
    low: np.float32,
    high: np.float32,
    result: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Rows `first` to `last - 1` of `search`, into `result` (out, groups)."""
    size = grouped.shape[2]
    shrink = np.float32((1.0 - SMALLEST) / (CANDIDATES - 1))
    for row in range(first, last):
        for group in range(grouped.shape[1]):
            weights, energy = grouped[row, group], importance[group]
            best = full[row, group]
            least = _error(weights, energy, best, low, high)
            for index in range(1, CANDIDATES):
                scale = full[row, group] * (np.float32(1.0) - shrink * np.float32(index))
                error = _error(weights, energy, scale, low, high)
                if error < least:
                    best, least = scale, error
            for _ in range(REFITS):
                inverse = np.float32(1.0) / best
                numerator = np.float32(0.0)
                denominator = np.float32(0.0)
                for j in range(size):
                    code = min(max(np.rint(weights[j] * inverse), low), high)
                    numerator += energy[j] * code * weights[j]
                    denominator += energy[j] * code * code
                if numerator > 0 and denominator > 0:
                    scale = numerator / denominator
                    error = _error(weights, energy, scale, low, high)
                    if error < least:
                        best, least = scale, error
            result[row, group] = best


def search(grouped: Tensor, full: Tensor, importance: Tensor, low: float, high: float) -> Tensor:
    """(out, groups) float32 scales; float32 arguments, otherwise as `reference.search`'s."""
    rows, groups, size = grouped.shape
    result = torch.empty(rows, groups)
    arrays = [part.contiguous().numpy() for part in (grouped, full, importance)]
    limits = np.float32(low), np.float32(high)
    over_rows(
        lambda first, last: _search_rows(*arrays, *limits, result.numpy(), first, last),
        rows,
        groups * size * (CANDIDATES + 2 * REFITS),
    )
    return result


@jit_contracted
def _error_of_halves(
    weights: NDArray[np.float32], importance: NDArray[np.float32], scale: np.float32, most: np.float32
) -> np.float32:
    inverse = np.float32(1.0) / scale
    total = np.float32(0.0)
    for j in range(weights.shape[0]):
        ratio = min(abs(weights[j]) * inverse, most)
        miss = nearest_code(ratio) * scale - abs(weights[j])
        total += importance[j] * (miss * miss)
    return total


@jit_contracted
def _choose_rows(
    grouped: NDArray[np.float32],
    candidates: NDArray[np.float32],
    importance: NDArray[np.float32],
    most: np.float32,
    result: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Rows `first` to `last - 1` of `choose`, into `result` (out, groups)."""
    for row in range(first, last):
        for group in range(grouped.shape[1]):
            weights, energy = grouped[row, group], importance[group]
            best = candidates[row, group, 0]
            least = _error_of_halves(weights, energy, best, most)
            for index in range(1, candidates.shape[2]):
                error = _error_of_halves(weights, energy, candidates[row, group, index], most)
                if error < least:
                    best, least = candidates[row, group, index], error
            result[row, group] = best


def choose(grouped: Tensor, candidates: Tensor, importance: Tensor) -> Tensor:
    """(out, groups) float32; see the package's `choose`."""
    rows, groups, size = grouped.shape
    result = torch.empty(rows, groups)
    arrays = [part.contiguous().numpy() for part in (grouped, candidates, importance)]
    most = np.float32(LARGEST_CODE)
    over_rows(
        lambda first, last: _choose_rows(*arrays, most, result.numpy(), first, last),
        rows,
        groups * size * candidates.shape[2],
    )
    return result
