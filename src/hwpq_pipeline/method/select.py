"""Choosing which weights of a group stay: contribution (saliency) scored and compared layer by layer.

A contribution matrix is as large as the model, so none is ever kept: the kernels work it out from the weight and the
inputs' energies while they read the weight. A step is a pure function of the group and the recipe, and it pickles: a
worker in another process may take it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hwpq_pipeline.checkpoints.masks import packed_masks, write_index
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.compression.ewma import Threshold, ewma_select
from hwpq_pipeline.compression.structured import SPARSITY, select_two_of_four
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.executor import Executor, serial
from hwpq_pipeline.method.group import Facts, Group
from hwpq_pipeline.method.groups import Groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.remarks import warn_of_silent_layers
from hwpq_pipeline.method.sections import Selection
from hwpq_pipeline.progress import with_progress

#: Fields of a recipe's selection that the moving average takes.
MOVING_AVERAGE = ("sparsity", "multiplier", "domain", "alpha", "beta", "scope")


@dataclass(frozen=True)
class SelectedGroup:
    """What was selected in a group.

    Attributes:
        name: of the input group.
        masks: by layer name, one bit a weight, true where it is kept (`compression.bits`), on the CPU.
        facts: by layer name: columns of the layer table.
    """

    name: str
    masks: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]]


def select_group(group: Group, recipe: Recipe) -> SelectedGroup:
    """The keep-masks of a group's layers.

    Args:
        group: with the dense weights and the sums of their inputs.
        recipe: what to select by; layers that it does not prune get no mask.

    Raises:
        HwpqError: a layer that the structure does not fit or that would lose every weight, values that are not
            finite, or inputs of which nothing is known.
    """
    recipe = recipe.for_layer(group.layers[0].name)
    if recipe.selection is None:  # of these layers
        return SelectedGroup(group.name, {}, {layer.name: {"reached_sparsity": 0.0} for layer in group.layers})
    if group.sums is None:
        raise HwpqError(
            "nothing to select by",
            where=group.name,
            remedy="Give a recipe with a selection, and calibration statistics.",
        )
    energy = group.sums.energy()
    metric = recipe.selection.metric if bool(energy.any()) else "magnitude"
    choose = _two_of_four if recipe.selection.structure == "2of4" else _unstructured
    masks, facts = {}, {}
    for layer, rows in group.rows:
        keep, found = choose(group.weight[rows], recipe.selection, energy, layer.name)
        masks[layer.name] = keep.cpu()
        facts[layer.name] = {"metric": metric, **found}
    return SelectedGroup(group.name, masks, facts)


def _two_of_four(weight: Tensor, selection: Selection, energy: Tensor, where: str) -> tuple[Tensor, dict[str, Any]]:
    chosen = select_two_of_four(weight, selection.metric, energy, where=where)
    return chosen.keep, {
        **_named(chosen.quantiles),
        "wanted_sparsity": SPARSITY,
        "reached_sparsity": chosen.reached,
    }


def _unstructured(weight: Tensor, selection: Selection, energy: Tensor, where: str) -> tuple[Tensor, dict[str, Any]]:
    settings = {name: getattr(selection, name) for name in MOVING_AVERAGE}
    chosen = ewma_select(weight, selection.metric, energy, Threshold(**settings), where=where)
    if chosen.reached == 1:
        raise HwpqError("every weight is dropped", where=where, remedy="Lower the selection's multiplier or sparsity.")
    if chosen.note:
        logging.getLogger(__name__).warning("%s: %s", where, chosen.note)
    return chosen.keep, {
        **_named(chosen.quantiles),
        "mean": chosen.mean,
        "deviation": chosen.deviation,
        "multiplier": chosen.multiplier_mean,
        "wanted_sparsity": chosen.wanted,
        "reached_sparsity": chosen.reached,
    }


def _named(quantiles: Mapping[str, float]) -> dict[str, float]:
    return {f"contribution_{name}": value for name, value in quantiles.items()}


def select_model(groups: Groups, recipe: Recipe, *, parts: Parts, executor: Executor = serial) -> None:
    """Select in every group that is not finished; `gather_masks` makes one whole of the parts.

    Args:
        groups: of the dense model (`open_groups`).
        recipe: what to select by; without a selection nothing is done.
        parts: takes each group's masks; those of an earlier run are not made again.
        executor: where the groups are worked on.

    Raises:
        HwpqError: a damaged weight, damaged statistics, or a layer that the structure does not fit.
    """
    if not recipe.selects:
        return
    groups = groups.treated_by(recipe)
    warn_of_silent_layers(groups)
    left = groups.only_those(name for name in groups.members() if not parts.is_whole(name))
    results = executor(partial(_select_and_keep, recipe=recipe, parts=parts), left)
    for _ in with_progress(results, "select: input groups", len(left.members())):
        pass


def _select_and_keep(group: Group, recipe: Recipe, parts: Parts) -> str:
    selected = select_group(group, recipe)
    parts.keep(selected.name, packed_masks(selected.masks), {"layers": list(selected.masks), "facts": selected.facts})
    return selected.name


def gather_masks(groups: Groups, recipe: Recipe, parts: Parts, target: Path) -> Facts:
    """The masks of all groups as one directory (`checkpoints.masks`).

    Args:
        groups, recipe: as for `select_model`, which has finished.
        parts: that it made.
        target: an existing, empty directory.

    Returns:
        Columns of the layer table by layer name; without a selection a reached sparsity of 0.
    """
    facts: Facts = {layer.name: {"reached_sparsity": 0.0} for layer in groups.layers}
    files: dict[str, str] = {}
    for name in groups.treated_by(recipe).members() if recipe.selects else ():
        told = parts.told(name)
        if parts.hand_over(name, target / f"{name}.safetensors"):
            files |= dict.fromkeys(told["layers"], name)
        facts.update(told["facts"])
    write_index(target, files)
    return facts
