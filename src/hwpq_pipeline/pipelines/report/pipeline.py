"""metrics, layers, continuations → one page for people. It waits for no server: it is written before `track` logs."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import keyed

from .nodes import page


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """The report over all variants."""
    names = list(names)
    return Pipeline(
        [
            node(
                page,
                {
                    "entries": "params:variants",
                    "calibration": "params:calibration",
                    "evaluation": "params:evaluation",
                    **keyed(names, "metrics"),
                    **keyed(names, "layers"),
                    **keyed(names, "continuations"),
                },
                "report",
                name="write_report",
                namespace="variants",
            )
        ]
    )
