"""An estimate of a run's cost from the model's shapes alone: bytes, memory, seconds.

With n weights in the compressible layers, m other parameters and T tokens:

    export        n·bits/8, a scale of one or two bytes a row or group, 2·m; under a budget what that allows
    statistics    Σ in² · 4 bytes over distinct layer inputs
    on disk       the export, masks of n/8 bytes, the neutral form of about n bytes
    memory        4·(n + m) bytes for the model in float32, and about as much again
    calibrate     2·T·(n + Σ in²) operations;   evaluate 2·T·(n + 2·head) for each variant
    compress      2·out·in² operations a layer, for each step of recovery and sweep of descent;
                  sequential, 2·T·(2·n + 2·Σ in²) more, and the activations of two runs of a block in memory
    healing       2·(n + head) operations for each of its tokens, three times (forward, and back for inputs and
                  weights), and once for the dense model; at most its minutes

A matrix product timed on this machine turns operations into seconds, as if nothing else were done. The estimate tells
minutes from hours; it is not a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, layer_map, meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.budget import layer_bytes, table_bytes, tables_bytes
from hwpq_pipeline.method.presets import PRESETS, ROUNDING_COST
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Budget, Choice


@dataclass(frozen=True)
class Shapes:
    """A model's shapes.

    Attributes:
        layers: the compressible ones.
        others: parameters outside of them.
        tables: rows and columns of the embedding, and of the head if it is not tied to it.
        head: parameters of the product that gives the logits.
        item: bytes of a number that is not rounded.
    """

    layers: tuple[Layer, ...]
    others: int
    head: int
    tables: tuple[tuple[int, int], ...] = ()
    item: int = 2

    @property
    def weights(self) -> int:
        """Weights of the compressible layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.weights + self.others

    @property
    def inputs(self) -> int:
        """Σ in² over distinct inputs, four a block as in today's transformers.

        The projections of attention share an input, its output has another, and the two halves of the feed-forward part
        have one each. Shapes cannot tell two inputs of equal width apart, so a block's widest input counts once and its
        narrowest three times.
        """
        widths: dict[int, set[int]] = {}
        for layer in self.layers:
            widths.setdefault(layer.block, set()).add(layer.shape[1])
        return sum(max(found) ** 2 + 3 * min(found) ** 2 for found in widths.values())


@dataclass(frozen=True)
class Row:
    """A line of the plan.

    Attributes:
        name: the variant, or the stages that all variants share.
        export_bytes: size of the model that users deploy; 0 if there is none.
        disk_bytes: all bytes that remain on disk.
        seconds: estimated.
    """

    name: str
    export_bytes: int
    disk_bytes: int
    seconds: float


def read_shapes(model: str | Path) -> Shapes:
    """A checkpoint's shapes, from its `config.json`; its numbers are taken for 16 bits where there are no weights yet.

    Raises:
        HwpqError: the file is missing, or the model is not a causal LM.
    """
    built = meta_model(model)
    found: LayerMap = layer_map(model)
    parameters: dict[str, Any] = {name: tensor.numel() for name, tensor in built.named_parameters()}
    head = built.get_output_embeddings()
    return Shapes(
        layers=found.layers,
        others=sum(parameters.values()) - sum(layer.shape[0] * layer.shape[1] for layer in found),
        head=head.weight.numel() if head is not None else 0,
        tables=tuple(table.shape for table in found.tables),
        item=_item(model),
    )


def _item(model: str | Path) -> int:
    try:
        return Checkpoint(model).torch_dtype.itemsize
    except HwpqError:
        return Shapes.item


def plan_rows(
    shapes: Shapes,
    recipes: Mapping[str, Recipe],
    *,
    calibration_tokens: int,
    evaluation_tokens: int,
    speed: float,
) -> list[Row]:
    """The rows of the stages that all variants share, then a row for each variant.

    Args:
        shapes: the dense model's shapes.
        recipes: the variants' recipes, by name.
        calibration_tokens: number of calibration tokens.
        evaluation_tokens: number of evaluation tokens.
        speed: operations a second.
    """
    calibrate = 2.0 * calibration_tokens * (shapes.weights + shapes.inputs)
    evaluate = 2.0 * evaluation_tokens * (shapes.weights + 2 * shapes.head)
    rows = [
        Row("fetch", 0, shapes.item * shapes.parameters, 0.0),
        Row("calibrate, reference", 0, 4 * shapes.inputs, (calibrate + evaluate) / speed),
    ]
    for name, recipe in recipes.items():
        export = export_bytes(shapes, recipe)
        masks = shapes.weights // 8 if recipe.selects else 0
        neutral = shapes.weights * (1 if any(part.quantization for part in recipe.parts) else shapes.item)
        seconds = (making_operations(shapes, recipe, calibration_tokens) + evaluate) / speed
        seconds += healing_seconds(shapes, recipe, speed)
        rows.append(Row(name, export, export + masks + neutral, seconds))
    return rows


def export_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """Bytes of a variant's safetensors files, without their headers; under a budget, what that allows."""
    if recipe.budget is not None:
        return _allowed_bytes(shapes, recipe, recipe.budget)
    total = shapes.item * shapes.others
    total += tables_bytes(shapes.tables, recipe.embeddings, shapes.item) - tables_bytes(
        shapes.tables, None, shapes.item
    )
    for layer in shapes.layers:
        total += _layer(shapes, layer, Choice("", None, recipe.for_layer(layer.name).quantization), packed=False)
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
            costs = [_layer(shapes, layer, choice, packed=packed) for choice in budget.choices]
            least, most, weights = least + min(costs), most + max(costs), weights + layer.shape[0] * layer.shape[1]
        else:
            own = recipe.for_layer(layer.name)
            fixed += _layer(shapes, layer, Choice("", own.selection, own.quantization), packed=packed)
    return Bounds(fixed, least, most, weights)


def _layer(shapes: Shapes, layer: Layer, choice: Choice, *, packed: bool) -> int:
    if not packed and not layer.packs:  # its values are stored, whatever it is rounded to
        choice = Choice(choice.name)
    return layer_bytes(layer.shape, choice, packed=packed, dense=shapes.item)


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
