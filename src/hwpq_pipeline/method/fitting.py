"""Whether a recipe fits a model, told from shapes alone: before anything is computed, and for every layer at once."""

from __future__ import annotations

from dataclasses import replace

from hwpq_pipeline.checkpoints.layers import Layer, LayerMap
from hwpq_pipeline.compression.grids import GRIDS, check_group
from hwpq_pipeline.compression.structured import check_columns
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.overrides import check_patterns
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Quantization


def misfits(recipe: Recipe, layers: LayerMap, variant: str) -> list[HwpqError]:
    """Why a recipe does not fit a model: an error for each kind of layer that its structure or groups do not divide.

    Under a budget one choice that fits is enough.

    Args:
        recipe: what is to be done.
        layers: of the model.
        variant: its name, for the errors.
    """
    try:
        check_patterns(recipe.overrides, layers.names)
    except HwpqError as error:
        return [HwpqError(error.what, where=f"{variant}: {error.where}", remedy=error.remedy)]
    found: dict[str, HwpqError] = {}
    for layer in layers:
        parts = (
            replace(recipe, overrides=()).parts if recipe.leaves_open(layer.name) else [recipe.for_layer(layer.name)]
        )
        wrong = [misfit(layer, part) for part in parts]
        if (first := wrong[0]) is not None and all(wrong):
            found.setdefault(first.what, HwpqError(first.what, where=f"{variant}: {layer.name}", remedy=first.remedy))
    return [
        *found.values(),
        *_misfits_of_embeddings(recipe, layers, variant),
        *_misfits_of_budget(recipe, layers, variant),
        *_misfits_of_healing(recipe, layers, variant),
    ]


def misfit(layer: Layer, own: Recipe) -> HwpqError | None:
    """Why what a recipe does to all layers does not fit one of them; None if it does."""
    try:
        if own.selection is not None and own.selection.structure == "2of4":
            check_columns(layer.shape[1], layer.name)
        if own.quantization is not None:
            check_group(layer.shape[1], GRIDS[own.quantization.grid], own.quantization.group_size, layer.name)
    except HwpqError as error:
        return error
    return None


def _misfits_of_embeddings(recipe: Recipe, layers: LayerMap, variant: str) -> list[HwpqError]:
    """An embedding in codes, beside the layers' own."""
    if recipe.embeddings is None:
        return []
    remedy = "Set quantization.embeddings to none."
    if not layers.tables or not all(table.packs for table in layers.tables):
        what = "transformers finds no codes of this model's embedding"
        return [HwpqError(what, where=variant, remedy=remedy)]
    return _misfits_of_mixtures(recipe, layers, where=variant, remedy=remedy)


def _misfits_of_budget(recipe: Recipe, layers: LayerMap, variant: str) -> list[HwpqError]:
    """Codes of several kinds that the export could not store as codes, and a budget that decides on nothing."""
    if recipe.budget is None:
        return []
    where = f"{variant}: budget"
    if not any(recipe.leaves_open(layer.name) for layer in layers):
        return [HwpqError("it decides on no layer", where=where, remedy="Take layers out of ignore and layers.")]
    if len({(part.grid, part.group_size) for part in _quantizations(recipe)}) < 2:
        return []
    return _misfits_of_mixtures(recipe, layers, where=where, remedy="Leave one kind of codes among the choices.")


def _misfits_of_mixtures(recipe: Recipe, layers: LayerMap, *, where: str, remedy: str) -> list[HwpqError]:
    """Transformers unpacks codes of several kinds only where the model calls all layers as modules of their own."""
    what = None
    if found := [part.grid for part in _quantizations(recipe) if GRIDS[part.grid].coarsening]:
        what = f"transformers unpacks grid {found[0]} when it loads, and no further grid beside it"
    elif lost := [layer.name for layer in layers if layer.packs and not layer.called]:
        what = f"transformers unpacks this model when it loads ({lost[0]} is no module of its own), by one grid"
    return [] if what is None else [HwpqError(what, where=where, remedy=remedy)]


def _quantizations(recipe: Recipe) -> list[Quantization]:
    return [part.quantization for part in recipe.parts if part.quantization is not None]


def _misfits_of_healing(recipe: Recipe, layers: LayerMap, variant: str) -> list[HwpqError]:
    """Healing of a model in which nothing is changed."""
    if recipe.healing is None or recipe.budget is not None:
        return []
    if any(recipe.for_layer(layer.name).changes_weights for layer in layers):
        return []
    what = "ignore and layers leave every layer as it is, so there is nothing to heal"
    return [HwpqError(what, where=variant, remedy="Remove healing, or take layers out of ignore.")]
