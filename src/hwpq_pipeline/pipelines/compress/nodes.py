"""The node that makes a variant's weights."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd

from hwpq_pipeline.checkpoints.compressed import CompressedWriter, Masks
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.layer_columns import COMPRESSED
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import compress_model
from hwpq_pipeline.parameters import Compute
from hwpq_pipeline.pipelines.tables import layer_table
from hwpq_pipeline.variant import Variant


def compress_weights(
    model: Path,
    statistics: Path,
    samples: pd.DataFrame,
    masks: Path,
    name: str,
    variant: Variant,
    compute: Compute,
    scratch: Path,
) -> tuple[Path, pd.DataFrame, dict[str, float]]:
    """Prune, recover and round, each group written as soon as it is done.

    Returns the directory, the layer table and the seconds it took.
    """
    begun = time.perf_counter()
    groups = open_groups(model, statistics, choose_device(compute.device, tf32=compute.tf32, where="compress"))
    recipe = Recipe.from_variant(variant.model_dump())
    target = scratch / "compressed"
    target.mkdir()
    writer = CompressedWriter(target)
    facts = compress_model(
        groups,
        Masks(masks),
        recipe,
        tokens=token_matrix(samples),
        sink=writer.add,
    )
    writer.close(name, recipe.structure, recipe.to_json())
    return target, layer_table(groups.layers, facts, COMPRESSED), {"compress": time.perf_counter() - begun}
