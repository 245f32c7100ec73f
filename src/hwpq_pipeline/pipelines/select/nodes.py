"""Nodes that choose which weights of a variant stay."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pandas as pd
from torch import Tensor

from hwpq_pipeline.calibration.statistics import Statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.execution.groups import Group, Groups
from hwpq_pipeline.execution.tables import layer_table
from hwpq_pipeline.parameters import Selection, Variant

FACTS = ("metric", "contribution_q05", "contribution_q50", "contribution_q95", "mean", "deviation",
         "multiplier", "wanted_sparsity", "reached_sparsity")


def score_contributions(model: Path, statistics: Path, variant: Variant) -> Groups:
    """Bind every layer to the energies of its inputs and the metric.

    A contribution matrix is as large as the model: nothing is computed here, the selection works it out from
    weight and energy as it reads the weight.
    """
    return Groups(Checkpoint(model), layer_map(model), Statistics(statistics))


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
    energy = group.statistics.energy(group.name)
    facts = {}
    for layer, rows in group.rows:
        chosen = select_layer(group.weight[rows], selection, energy, layer.name)
        masks[f"{layer.name}.keep"] = chosen.keep
        facts[layer.name] = {"metric": selection.metric, **chosen.facts}
    return replace(group, facts=facts)
