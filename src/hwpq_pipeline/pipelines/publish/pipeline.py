"""exports and their figures → model cards with the measured quality, for every variant; an upload if a hub is named."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import publish


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One node a variant."""
    return for_each_variant(
        [
            node(
                publish,
                ["export", "formats", "metrics", "name", "params:export", "scratch"],
                "cards",
                name="publish",
            ),
        ],
        names,
    )
