"""Compressing a whole model, group by group.

Two schedules, one method. *Independent*: the sums of the dense model are there and the groups have no order between
them, so that an executor may hand them to any workers. *In sequence*: block after block, each group on what the
compressed ones before it give (`method.sequential`). Both take the same pure steps on a group.

Each group is written as soon as it is done, so that memory is bounded by the groups at work, and a run that was killed
goes on from the last of them (`checkpoints.parts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed_writer import CompressedWriter
from hwpq_pipeline.checkpoints.masks import Masks
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.allocation import choose_layers
from hwpq_pipeline.method.embeddings import rounded_embeddings
from hwpq_pipeline.method.executor import Executor, serial
from hwpq_pipeline.method.group import Facts, Group
from hwpq_pipeline.method.groups import Groups, open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.remarks import warn_of_dense_weights, warn_of_silent_layers
from hwpq_pipeline.method.select import gather_masks, select_model
from hwpq_pipeline.method.sequential import walk_in_sequence
from hwpq_pipeline.method.steps import compress_group, packed, take_steps
from hwpq_pipeline.processes import temporary_folder
from hwpq_pipeline.progress import with_progress


def compress_model(
    groups: Groups,
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    parts: Parts,
    tokens: np.ndarray[Any, Any] | Tensor | None = None,
    executor: Executor = serial,
) -> None:
    """Prune, recover and round every group that is not finished; `gather_model` makes one whole of the parts.

    Args:
        groups: of the dense model (`open_groups`).
        masks: packed keep-masks by layer name (`gather_masks`); read only if the recipe selects.
        recipe: what to do.
        parts: takes each group's compressed layers; those of an earlier run are not made again.
        tokens: (samples, length) calibration tokens, for a recipe in sequence.
        executor: where the groups are worked on; a recipe in sequence works in this process.

    Raises:
        HwpqError: a damaged weight, damaged statistics, a missing mask, or a step that cannot be taken.
    """
    if not recipe.changes_weights:
        return
    groups = groups.treated_by(recipe)
    warn_of_dense_weights(groups)
    if recipe.needs_text and not recipe.selects:  # else the selection has said it
        warn_of_silent_layers(groups)
    left = groups.only_those(name for name in groups.members() if not parts.is_whole(name))
    if recipe.sequence is None:
        results = executor(partial(_compress_and_keep, masks=masks, recipe=recipe, parts=parts), left)
    else:
        results = _in_sequence(groups, left, masks, recipe, tokens, parts)
    for _ in with_progress(results, "compress: input groups", len(left.members())):
        pass


def _compress_and_keep(group: Group, masks: Mapping[str, Tensor], recipe: Recipe, parts: Parts) -> str:
    return compress_group(group, masks, recipe).keep(parts)


def _in_sequence(
    groups: Groups,
    left: Groups,
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    tokens: np.ndarray[Any, Any] | Tensor | None,
    parts: Parts,
) -> Iterator[str]:
    """Names of the groups as they are finished; a walk that was killed goes on from a milestone."""
    if tokens is None or recipe.sequence is None or groups.statistics is None:
        raise HwpqError(
            "layers in sequence need calibration tokens and statistics", where="compress", remedy="Run calibrate first."
        )
    unfinished = left.members()
    if not unfinished:
        return
    made = walk_in_sequence(
        groups,
        tokens,
        partial(take_steps, masks=masks, recipe=recipe),
        recipe.sequence,
        finish=packed,
        dtype=getattr(torch, groups.statistics.dtype),
        milestones=Milestones(parts.folder / "states"),
        needed=min(layers[0].block for layers in unfinished.values()),
    )
    for compressed in made:
        compressed.keep(parts)
        if compressed.name in unfinished:
            yield compressed.name


def gather_model(groups: Groups, recipe: Recipe, parts: Parts, target: Path, *, name: str) -> Facts:
    """The compressed layers of all groups, and the rounded embedding and head, as one model (`checkpoints.compressed`).

    Args:
        groups, recipe: as for `compress_model`, which has finished.
        parts: that it made.
        target: an existing, empty directory.
        name: of the variant, which the compressed model names.

    Returns:
        Columns of the layer table by layer name.
    """
    facts: Facts = {}
    writer = CompressedWriter(target)
    for group in groups.treated_by(recipe).members() if recipe.changes_weights else ():
        facts.update(writer.take(parts, group))
    for table, quantized in rounded_embeddings(groups.checkpoint.path, recipe.embeddings):
        writer.embed(table.name, quantized)
    writer.close(name, recipe.structure, recipe.to_json())
    return facts


def write_model(
    model: str | Path,
    statistics: str | Path | None,
    recipe: Recipe,
    target: Path,
    *,
    name: str,
    tokens: np.ndarray[Any, Any] | Tensor | None = None,
    device: torch.device | None = None,
    executor: Executor = serial,
) -> Facts:
    """Select and compress a model in one go, and write the compressed model; the pipelines do it in two stages.

    Args:
        model: the dense checkpoint.
        statistics: directory of its inputs' sums; None for a recipe that needs no data.
        recipe: what to do.
        target: an existing, empty directory (`checkpoints.compressed`).
        name: of the variant, which the compressed model names.
        tokens: (samples, length) calibration tokens, for a recipe in sequence or with a budget.
        device: where the groups are worked on; the CPU by default.
        executor: maps steps over groups.

    Returns:
        Columns of the layer table by layer name.

    Raises:
        HwpqError: as `select_model` and `compress_model`.
    """
    groups = open_groups(model, statistics, device)
    if recipe.budget is not None:
        if tokens is None:
            raise HwpqError("a budget needs calibration tokens", where=name, remedy="Give them.")
        recipe = recipe.with_choices(choose_layers(groups, recipe, tokens, where=name))
    with temporary_folder(target.parent, "work-") as work:
        masks, selection, compression = (work / part for part in ("masks", "selection", "compression"))
        masks.mkdir()
        select_model(groups, recipe, parts=(selected := Parts(selection)), executor=executor)
        found = gather_masks(groups, recipe, selected, masks)
        compressed = Parts(compression)
        compress_model(groups, Masks(masks), recipe, parts=compressed, tokens=tokens, executor=executor)
        made = gather_model(groups, recipe, compressed, target, name=name)
    return {layer: {**found[layer], **made.get(layer, {})} for layer in found}
