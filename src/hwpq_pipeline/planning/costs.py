"""Operations and seconds to make a variant, and how fast this machine is."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from hwpq_pipeline.method.presets import PRESETS, ROUNDING_COST
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.planning.shapes import Shapes


def making_operations(shapes: Shapes, recipe: Recipe, tokens: int) -> float:
    """Operations to select, to compress and to measure the errors of a variant with `tokens` calibration tokens."""
    total = 0.0
    if recipe.sequence:
        total += 2.0 * tokens * (2 * shapes.weights + 2 * shapes.inputs)
    squares = [(layer.name, 2.0 * layer.shape[0] * layer.shape[1] ** 2) for layer in shapes.layers]
    if recipe.budget is not None:  # a trial of each choice, and one of them for good
        plain = replace(recipe, budget=None, sequence=None)
        choices = [replace(plain, selection=c.selection, quantization=c.quantization) for c in recipe.budget.choices]
        choices = [one if one.selection else replace(one, recovery=None) for one in choices]
        passes = sum(map(_passes, choices)) + max(map(_passes, choices))
        return total + passes * sum(cost for _, cost in squares)
    return total + sum(_passes(recipe.for_layer(name)) * cost for name, cost in squares)


def healing_seconds(shapes: Shapes, recipe: Recipe, speed: float) -> float:
    """Seconds that a variant is healed."""
    if recipe.healing is None:
        return 0.0
    return min(60 * recipe.healing.minutes, 4 * 2.0 * recipe.healing.tokens * (shapes.weights + shapes.head) / speed)


def _passes(recipe: Recipe) -> int:
    """Passes over a layer's quadratic."""
    if not recipe.changes_weights:
        return 0
    passes = (1 if recipe.selection else 0) + (1 if recipe.quantization else 0)
    if recipe.recovery:
        passes += recipe.recovery.steps or PRESETS[recipe.recovery.preset].cost
    if recipe.quantization and recipe.quantization.sweeps:
        passes += ROUNDING_COST * recipe.quantization.sweeps
    if recipe.sequence:
        passes += recipe.sequence.steps
    return passes


def operations_a_second(size: int = 1024) -> float:
    """Operations a second of a float32 matrix product on this machine; timing it takes about a tenth of a second."""
    one = torch.ones(size, size)
    torch.mm(one, one)
    begun = time.perf_counter()
    for _ in range(3):
        torch.mm(one, one)
    return 3 * 2 * size**3 / (time.perf_counter() - begun)
