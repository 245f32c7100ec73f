"""Bytes of a variant's export, and which budgets can be kept: from shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.budget import stored_bytes, table_bytes, tables_bytes
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Budget, Choice
from hwpq_pipeline.planning.shapes import Shapes


def export_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """Bytes of a variant's safetensors files, without their headers; under a budget, what that allows."""
    if recipe.budget is not None:
        return _allowed_bytes(shapes, recipe, recipe.budget)
    total = shapes.item * shapes.others
    total += tables_bytes(shapes.tables, recipe.embeddings, shapes.item) - tables_bytes(
        shapes.tables, None, shapes.item
    )
    for layer in shapes.layers:
        total += stored_bytes(
            layer, Choice("", None, recipe.for_layer(layer.name).quantization), packed=False, dense=shapes.item
        )
    return total


@dataclass(frozen=True)
class Bounds:
    """Of a model under a budget, all layers with their smallest or their largest choice, in bytes.

    Attributes:
        fixed: what the budget does not decide on.
        least, most: the layers that it decides on.
        weights: of these layers.
    """

    fixed: int
    least: int
    most: int
    weights: int


def _bounds(shapes: Shapes, recipe: Recipe, budget: Budget) -> Bounds:
    packed = budget.kind == "decode_speed_ratio"
    fixed = shapes.item * shapes.others + tables_bytes(shapes.tables, recipe.embeddings, shapes.item)
    fixed -= tables_bytes(shapes.tables, None, shapes.item)
    if packed:  # what a token reads
        fixed = sum(table_bytes(shape, recipe.embeddings, shapes.item) for shape in shapes.tables[-1:])
    least = most = weights = 0
    for layer in shapes.layers:
        if recipe.leaves_open(layer.name):
            costs = [stored_bytes(layer, choice, packed=packed, dense=shapes.item) for choice in budget.choices]
            least, most, weights = least + min(costs), most + max(costs), weights + layer.shape[0] * layer.shape[1]
        else:
            own = recipe.for_layer(layer.name)
            choice = Choice("", own.selection, own.quantization)
            fixed += stored_bytes(layer, choice, packed=packed, dense=shapes.item)
    return Bounds(fixed, least, most, weights)


def _read_when_dense(shapes: Shapes) -> int:
    return shapes.item * (shapes.weights + shapes.head)


def tightest(shapes: Shapes, recipe: Recipe) -> float | None:
    """The limit of a recipe's budget at which every layer has its smallest choice; None without a budget."""
    if (budget := recipe.budget) is None:
        return None
    found = _bounds(shapes, recipe, budget)
    whole = found.fixed + found.least
    return {
        "size_bytes": float(whole),
        "ratio": whole / (shapes.item * shapes.parameters),
        "bits_per_weight": 8 * found.least / max(1, found.weights),
        "decode_speed_ratio": _read_when_dense(shapes) / max(1, whole),
    }[budget.kind]


def out_of_reach(shapes: Shapes, recipe: Recipe, variant: str) -> HwpqError | None:
    """Why no choices keep a recipe's budget; None if some do. Headers of the export are not counted."""
    bound = tightest(shapes, recipe)
    if bound is None or recipe.budget is None:
        return None
    kind, limit = recipe.budget.kind, recipe.budget.limit
    if (limit <= bound) if kind == "decode_speed_ratio" else (limit >= bound):
        return None
    reached, side = ("at most", "lower") if kind == "decode_speed_ratio" else ("at least", "higher")
    return HwpqError(
        f"{limit:.9g} cannot be reached: with the smallest choices it is {bound:.9g}",
        where=f"{variant}: budget.{kind}",
        remedy=f"Set it {side} ({reached} that), or add a smaller choice.",
    )


def _allowed_bytes(shapes: Shapes, recipe: Recipe, budget: Budget) -> int:
    """Of an export under a budget: what it allows, and no more than the largest choices take.

    For a decode speed the layers shrink by as much as what a token reads; zeros are left out.
    """
    found = _bounds(shapes, recipe, budget)
    layers = {
        "size_bytes": budget.limit - found.fixed,
        "ratio": budget.limit * shapes.item * shapes.parameters - found.fixed,
        "bits_per_weight": budget.limit * found.weights / 8,
        "decode_speed_ratio": _read_when_dense(shapes) / budget.limit - found.fixed,
    }
    fixed = found.fixed
    if budget.kind == "decode_speed_ratio":  # the export has all of the model
        fixed = _bounds(shapes, recipe, replace(budget, kind="size_bytes")).fixed
    return fixed + int(min(max(layers[budget.kind], found.least), found.most))
