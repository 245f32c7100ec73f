"""The readable version: rows one by one, every quantity from its definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.mask_descent import PAIRS, RIDGE


def two_of_four(values: Tensor, target: Tensor, gram: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """One sweep over the groups of four: values (out, in) float64, and keep (out, in) bool.

    Args:
        values: (out, in) where to start.
        target: (out, in) the dense V₀.
        gram: (in, in) with ones on its diagonal.
        shrink: factor of what does not stay.
    """
    values, target, gram = values.double().clone(), target.double(), gram.double()
    keep = torch.zeros(values.shape, dtype=torch.bool)
    for row in range(values.shape[0]):
        for first in range(0, values.shape[1], 4):
            group = slice(first, first + 4)
            tile = gram[group, group]
            slope = (values[row] - target[row]) @ gram[:, group]
            wanted = tile @ values[row, group] - slope
            gains = [_gain(tile, wanted, pair) for pair in PAIRS]
            pair = list(PAIRS[max(range(6), key=lambda choice: gains[choice])])
            fresh = shrink * values[row, group]
            fresh[pair] = 0.0
            fresh[pair] = _inverse(tile, pair) @ (wanted - tile @ fresh)[pair]
            values[row, group] = fresh
            keep[row, [first + pair[0], first + pair[1]]] = True
    return values, keep


def _inverse(tile: Tensor, pair: list[int] | tuple[int, int]) -> Tensor:
    """(2, 2) inverse of the pair's part of a group's tile."""
    (i, j), (a, b, c) = pair, (tile[pair[0], pair[0]], tile[pair[0], pair[1]], tile[pair[1], pair[1]])
    assert i != j  # noqa: S101 - a pair
    adjugate = torch.stack([torch.stack([c, -b]), torch.stack([-b, a])])
    return adjugate / (a * c - b * b + RIDGE)


def _gain(tile: Tensor, wanted: Tensor, pair: tuple[int, int]) -> float:
    part = wanted[list(pair)]
    return float(part @ _inverse(tile, pair) @ part)


def above(values: Tensor, target: Tensor, gram: Tensor, threshold: float, shrink: float) -> tuple[Tensor, Tensor]:
    """One sweep over the columns: values (out, in) float64, and the scores `|b|` (out, in) that were compared."""
    values, target, gram = values.double().clone(), target.double(), gram.double()
    scores = torch.zeros_like(values)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            best = values[row, column] - (values[row] - target[row]) @ gram[:, column]
            scores[row, column] = best.abs()
            values[row, column] = best if best.abs() > threshold else shrink * values[row, column]
    return values, scores


def fixed(values: Tensor, target: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """One sweep over the columns with the mask (out, in) as it is: values (out, in) float64."""
    values, target, gram = values.double().clone(), target.double(), gram.double()
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            best = values[row, column] - (values[row] - target[row]) @ gram[:, column]
            values[row, column] = best if mask[row, column] else 0.0
    return values


def threshold(scores: Tensor, kept: int) -> float:
    """The largest number that exactly `kept` scores exceed (by a sort; ties count among the dropped)."""
    ordered = scores.flatten().sort(descending=True).values
    return float(ordered[kept]) if kept < ordered.numel() else -1.0
