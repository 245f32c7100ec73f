"""metrics and plots → comparison table and Pareto plot; then MLflow, one run a variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant, keyed

from .nodes import announce, compare, log, record


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Logging in each variant's namespace, and the comparison.

    A runner takes the nodes level by level: `compare` is of the first, `log` of the second, so that the comparison is
    on disk before a server can fail.
    """
    names = list(names)
    logging = for_each_variant(
        [
            node(
                record,
                [
                    "name",
                    "model",
                    "corpus",
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
    comparing = node(
        compare,
        {
            "scratch": "scratch",
            **keyed(names, "metrics"),
        },
        ["comparison", "pareto_plot"],
        name="compare",
        namespace="variants",
    )
    announcing = node(
        announce,
        {"comparison": "comparison", "track": "params:track", **keyed(names, "new_run")},
        None,
        name="announce",
        namespace="variants",
    )
    return logging + Pipeline([comparing, announcing])
