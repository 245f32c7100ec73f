"""Compressing a whole model, group by group.

Two schedules, one method. *Independent*: the sums of the dense model are there and the groups have no order between
them, so that an executor may hand them to any workers. *In sequence*: block after block, each group on what the
compressed ones before it give (`method.sequential`). Both take the same pure steps on a group.

A sink gets each result as soon as it is there, so that memory is bounded by the groups at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed_writer import CompressedWriter
from hwpq_pipeline.checkpoints.masks import Masks, MaskWriter
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.allocation import choose_layers
from hwpq_pipeline.method.embeddings import rounded_embeddings
from hwpq_pipeline.method.groups import Executor, Facts, Groups, open_groups, serial
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.remarks import warn_of_dense_weights, warn_of_silent_layers
from hwpq_pipeline.method.select import select_model
from hwpq_pipeline.method.sequential import walk_in_sequence
from hwpq_pipeline.method.steps import CompressedGroup, compress_group, packed, take_steps
from hwpq_pipeline.progress import with_progress


def compress_model(
    groups: Groups,
    masks: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    sink: Callable[[CompressedGroup], None],
    tokens: np.ndarray[Any, Any] | Tensor | None = None,
    executor: Executor = serial,
) -> Facts:
    """Prune, recover and round every group.

    Args:
        groups: of the dense model (`open_groups`).
        masks: packed keep-masks by layer name (`select_model`); read only if the recipe selects.
        recipe: what to do.
        sink: gets each group's compressed layers.
        tokens: (samples, length) calibration tokens, for a recipe in sequence.
        executor: where the groups are worked on; a recipe in sequence works in this process.

    Returns:
        Columns of the layer table by layer name.

    Raises:
        HwpqError: a damaged weight, damaged statistics, a missing mask, or a step that cannot be taken.
    """
    facts: Facts = {}
    groups = groups.treated_by(recipe)
    if not recipe.changes_weights:
        return facts
    warn_of_dense_weights(groups)
    if recipe.needs_text and not recipe.selects:  # else the selection has said it
        warn_of_silent_layers(groups)
    results: Iterator[CompressedGroup]
    if recipe.sequence is None:
        results = executor(partial(compress_group, masks=masks, recipe=recipe), groups)
    else:
        results = _in_sequence(groups, masks, recipe, tokens)
    for compressed in with_progress(results, "compress: input groups", len(groups.members())):
        sink(compressed)
        facts.update(compressed.facts)
    return facts


def _in_sequence(
    groups: Groups, masks: Mapping[str, Tensor], recipe: Recipe, tokens: np.ndarray[Any, Any] | Tensor | None
) -> Iterator[CompressedGroup]:
    if tokens is None or recipe.sequence is None or groups.statistics is None:
        raise HwpqError(
            "layers in sequence need calibration tokens and statistics", where="compress", remedy="Run calibrate first."
        )
    dtype = getattr(torch, groups.statistics.dtype)
    step = partial(take_steps, masks=masks, recipe=recipe)
    return walk_in_sequence(groups, tokens, step, recipe.sequence, finish=packed, dtype=dtype)


def write_embeddings(model: str | Path, recipe: Recipe, writer: CompressedWriter) -> None:
    """Round the embedding and the head, if the recipe does, and write them beside the layers."""
    for table, quantized in rounded_embeddings(model, recipe.embeddings):
        writer.embed(table.name, quantized)


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
    with TemporaryDirectory(dir=target.parent, prefix="masks-") as scratch:
        masks = MaskWriter(Path(scratch) / "masks")
        selected = select_model(groups, recipe, sink=masks.add, executor=executor)
        writer = CompressedWriter(target)
        compressed = compress_model(
            groups,
            Masks(masks.close()),
            recipe,
            sink=writer.add,
            tokens=tokens,
            executor=executor,
        )
    write_embeddings(model, recipe, writer)
    writer.close(name, recipe.structure, recipe.to_json())
    return {layer: {**selected[layer], **compressed.get(layer, {})} for layer in selected}
