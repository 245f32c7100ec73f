"""metrics, layers, continuations → one page for people. It waits for no server: it is written before `track` logs."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

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
                    **{
                        f"{kind}:{name}": f"variants.{name}.{kind}"
                        for kind in ("metrics", "layers", "continuations")
                        for name in names
                    },
                },
                "report",
                name="write_report",
                namespace="variants",
            )
        ]
    )
