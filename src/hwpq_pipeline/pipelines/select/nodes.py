"""The node that chooses which weights of a variant stay."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hwpq_pipeline.checkpoints.masks import MaskWriter
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.layer_columns import SELECTED
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.method.allocation import choose_layers
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.select import select_model
from hwpq_pipeline.parameters import Compute
from hwpq_pipeline.pipelines.tables import layer_table
from hwpq_pipeline.variant import Variant


def select_weights(
    model: Path,
    statistics: Path,
    samples: pd.DataFrame,
    name: str,
    variant: Variant,
    compute: Compute,
    scratch: Path,
) -> tuple[dict[str, str], Path, pd.DataFrame, Measured]:
    """Share out the variant's budget, if it has one; then score and select layer by layer.

    Returns each layer's choice, the directory of keep-masks, the layer table and what it took.
    """
    measuring = Measuring("select")
    groups = open_groups(model, statistics, choose_device(compute.device, tf32=compute.tf32, where="select"))
    recipe = Recipe.from_variant(variant.model_dump())
    choices = choose_layers(groups, recipe, token_matrix(samples), where=name)
    recipe = recipe.with_choices(choices)
    writer = MaskWriter(scratch / "masks")
    facts = select_model(groups, recipe, sink=writer.add)
    masks = writer.close()
    return choices, masks, layer_table(groups.layers, facts, SELECTED), measuring.end(masks)
