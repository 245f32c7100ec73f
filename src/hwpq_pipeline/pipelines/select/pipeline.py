"""dense model, statistics, calibration tokens → choices, keep-masks and the layer table, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.forgetting import forgetting_of_variant
from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import select_weights


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One walk over the layers."""
    return for_each_variant(
        [
            node(
                select_weights,
                ["model", "statistics", "calibration", "name", "params:variant", "params:compute", "work"],
                ["choices", "masks", "selected_layers", "select_measured"],
                name="select_weights",
            ),
            forgetting_of_variant("select", ["masks", "selected_layers", "select_measured"]),
        ],
        names,
    )
