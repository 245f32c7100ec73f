"""The node that chooses which weights of a variant stay."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hwpq_pipeline.checkpoints.parts import Parts, kept_json
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.layer_columns import SELECTED
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.method.allocation import choose_layers
from hwpq_pipeline.method.executor import of_run
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.select import gather_masks, select_model
from hwpq_pipeline.parameters import Compute
from hwpq_pipeline.pipelines.tables import layer_table
from hwpq_pipeline.variant import Variant
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import open_work, result_folder


def select_weights(
    model: Path,
    statistics: Path,
    samples: pd.DataFrame,
    name: str,
    variant: Variant,
    compute: Compute,
    work: Path,
) -> tuple[dict[str, str], Path, pd.DataFrame, Measured]:
    """Share out the variant's budget, if it has one; then score and select layer by layer.

    Returns each layer's choice, the directory of keep-masks, the layer table and what it took.
    """
    measuring = Measuring("select")
    groups = open_groups(model, statistics, choose_device(compute.device, tf32=compute.tf32, where="select"))
    recipe, tokens = Recipe.from_variant(variant.model_dump()), token_matrix(samples)
    key = work_key(
        {"model": model, "statistics": statistics},
        recipe=recipe.to_json(),
        tokens=tokens_digest(tokens),
        device=str(groups.device),
        tf32=compute.tf32,
    )
    folder = open_work(work, f"select.{name}", key)
    choices = kept_json(folder / "choices.json", lambda: choose_layers(groups, recipe, tokens, where=name))
    recipe = recipe.with_choices(choices)
    parts = Parts(folder / "parts")
    select_model(groups, recipe, parts=parts, executor=of_run())
    target = result_folder(folder)
    facts = gather_masks(groups, recipe, parts, target)
    return choices, target, layer_table(groups.layers, facts, SELECTED), measuring.end(target)
