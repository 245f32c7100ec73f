"""dense model, statistics → keep-masks and the layer table, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import score_contributions, select_weights


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Scoring (lazy), then one walk over the layers."""
    return for_each_variant(
        [
            node(
                score_contributions,
                ["model", "statistics", "params:compute"],
                "contributions",
                name="score_contributions",
            ),
            node(
                select_weights,
                ["contributions", "params:variant"],
                ["masks", "selected_layers", "select_seconds"],
                name="select_weights",
            ),
        ],
        names,
    )
