"""The nodes that make a variant's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hwpq_pipeline.checkpoints.masks import Masks
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.layer_columns import COMPRESSED
from hwpq_pipeline.measuring import Measured, Measuring, together
from hwpq_pipeline.method.executor import of_run
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.healed import samples_needed, write_healed
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import compress_model, gather_model
from hwpq_pipeline.parameters import Calibration, Compute
from hwpq_pipeline.pipelines.tables import layer_table
from hwpq_pipeline.variant import Variant
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import open_work, result_folder


def settled_recipe(variant: Variant, choices: dict[str, str]) -> Recipe:
    """What is done to each layer, the budget's choices included."""
    return Recipe.from_variant(variant.model_dump()).with_choices(choices)


def compress_weights(
    model: Path,
    statistics: Path,
    samples: pd.DataFrame,
    masks: Path,
    name: str,
    recipe: Recipe,
    compute: Compute,
    work: Path,
) -> tuple[Path, pd.DataFrame, Measured]:
    """Prune, recover and round, each group written as soon as it is done.

    Returns the directory, the layer table and what it took.
    """
    measuring = Measuring("compress")
    groups = open_groups(model, statistics, choose_device(compute.device, tf32=compute.tf32, where="compress"))
    tokens = token_matrix(samples)
    key = work_key(
        {"model": model, "statistics": statistics, "masks": masks},
        recipe=recipe.to_json(),
        tokens=tokens_digest(tokens),
        device=str(groups.device),
        tf32=compute.tf32,
    )
    folder = open_work(work, f"compress.{name}", key)
    parts = Parts(folder / "parts")
    compress_model(groups, Masks(masks), recipe, parts=parts, tokens=tokens, executor=of_run())
    target = result_folder(folder)
    facts = gather_model(groups, recipe, parts, target, name=name)
    return target, layer_table(groups.layers, facts, COMPRESSED), measuring.end(target)


def draw_healing(
    documents: pd.DataFrame, model: Path, calibration: Calibration, variant: Variant, name: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The tokens that the variant is healed on, (samples, length); no samples for a variant that is not."""
    recipe = Recipe.from_variant(variant.model_dump())
    if recipe.healing is None:
        return np.empty((0, calibration.length), dtype=np.int64)
    samples = samples_needed(recipe, calibration.length)
    try:
        drawn = draw_samples(
            documents,
            model,
            split="calibration",
            samples=samples,
            length=calibration.length,
            seed=recipe.healing.seed,
        )
    except HwpqError as error:
        remedy = "Lower healing.tokens or healing.held_out, or take a larger corpus."
        raise HwpqError(error.what, where=f"variants.{name}: text to heal on", remedy=remedy) from error
    return token_matrix(drawn)


def heal_weights(
    compressed: Path,
    measured: Measured,
    model: Path,
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    variant: Variant,
    compute: Compute,
    name: str,
    work: Path,
) -> tuple[Path, Measured]:
    """Teach the compressed model to answer as the dense one; without `healing` it passes as it is.

    Returns the directory and what both took.
    """
    measuring = Measuring("compress")
    recipe = Recipe.from_variant(variant.model_dump())
    if recipe.healing is None:
        return compressed, measured
    states = work / f"heal.{name}"
    states.mkdir(exist_ok=True)
    target = result_folder(states)
    device = choose_device(compute.device, tf32=compute.tf32, where="compress")
    write_healed(model, compressed, recipe, target, tokens=tokens, states=states, device=device)
    healed = measuring.end(target)
    return target, {stage: together(part, healed[stage]) for stage, part in measured.items()}
