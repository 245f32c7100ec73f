"""metrics, limits → nothing, or an error. One node checks all variants, so that one run names all that fails."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import keyed

from .nodes import check


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """The check of every variant."""
    return Pipeline(
        [
            node(
                check,
                {"quality_gates": "params:quality_gates", **keyed(names, "metrics")},
                None,
                name="check_gates",
                namespace="variants",
            )
        ]
    )
