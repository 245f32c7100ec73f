"""metrics, charts, exports → MLflow, one run for each variant; then the comparison on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant, keyed

from .nodes import announce, log, record


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Logging in each variant's namespace, and the announcement.

    A runner takes the nodes level by level. `log` is a level below the page, which is the last of the report: the
    comparison, the charts and the page are on disk before a server can fail.
    """
    names = list(names)
    logging = for_each_variant(
        [
            node(
                record,
                [
                    "name",
                    "sources",
                    "calibration",
                    "evaluation",
                    "export",
                    "metrics",
                    "layers",
                    "error_plot",
                    "sparsity_plot",
                    "params:variant",
                    "params:calibration",
                    "params:evaluation",
                ],
                "recorded",
                name="record",
            ),
            node(log, ["recorded", "export", "params:track"], "new_run", name="log"),
        ],
        names,
    )
    announcing = node(
        announce,
        {"comparison": "comparison", "track": "params:track", **keyed(names, "new_run")},
        None,
        name="announce",
        namespace="variants",
    )
    return logging + Pipeline([announcing])
