"""Nodes that choose which weights of a variant stay."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.contribution import contribution_quantiles, root_factors
from hwpq_pipeline.compression.ewma import ewma_select
from hwpq_pipeline.compression.structured import select_two_of_four
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.method.groups import Group, Groups
from hwpq_pipeline.parameters import Compute, Selection, Variant
from hwpq_pipeline.pipelines.tables import layer_table

FACTS = (
    "metric",
    "contribution_q01",
    "contribution_q50",
    "contribution_q99",
    "mean",
    "deviation",
    "multiplier",
    "wanted_sparsity",
    "reached_sparsity",
)


def score_contributions(model: Path, statistics: Path, compute: Compute) -> Groups:
    """Bind every layer to the energies of its inputs.

    A contribution matrix is as large as the model: nothing is computed here, the selection works it out from
    weight and energy as it reads the weight.
    """
    device = choose_device(compute.device, tf32=compute.tf32, where="select")
    return Groups(Checkpoint(model), layer_map(model), Statistics(statistics), device=device)


def select_weights(groups: Groups, variant: Variant) -> tuple[dict[str, Tensor], pd.DataFrame, dict[str, float]]:
    """Walk over all layers; packed keep-masks, the layer table and the seconds it took."""
    begun = time.perf_counter()
    masks: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {layer.name: {"reached_sparsity": 0.0} for layer in groups.layers}
    if variant.selection is not None:
        step = partial(_select, selection=variant.selection, masks=masks)
        for group in groups.then(step).run("select: input groups"):
            facts.update(group.facts)
    return masks, layer_table(groups.layers, facts, FACTS), {"select": time.perf_counter() - begun}


def _select(group: Group, selection: Selection, masks: dict[str, Tensor]) -> Group:
    """Select in each layer of the group; masks go to `masks`, what there is to tell into the group's facts."""
    energy = group.statistics.energy(group.name)
    facts = {}
    for layer, rows in group.rows:
        choose = _two_of_four if selection.structure == "2of4" else _unstructured
        keep, found = choose(group.weight[rows], selection, energy, layer.name)
        masks[f"{layer.name}.keep"] = keep.cpu()
        facts[layer.name] = {"metric": selection.metric, **found}
    return replace(group, facts=facts)


def _two_of_four(weight: Tensor, selection: Selection, energy: Tensor, where: str) -> tuple[Tensor, dict[str, Any]]:
    keep = select_two_of_four(weight, selection.metric, energy, where=where)
    quantiles = contribution_quantiles(weight, root_factors(selection.metric, weight, energy))
    reached = 1 - int(unpack_bits(keep, weight.shape[1]).count_nonzero()) / weight.numel()
    return keep, {**_named(quantiles), "wanted_sparsity": 0.5, "reached_sparsity": reached}


def _unstructured(weight: Tensor, selection: Selection, energy: Tensor, where: str) -> tuple[Tensor, dict[str, Any]]:
    chosen = ewma_select(
        weight,
        selection.metric,
        energy,
        where=where,
        **selection.model_dump(include={"sparsity", "multiplier", "domain", "alpha", "beta", "scope"}),
    )
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


def _named(quantiles: dict[str, float]) -> dict[str, float]:
    return {f"contribution_{name}": value for name, value in quantiles.items()}
