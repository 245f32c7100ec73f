"""metrics and plots → MLflow, one run a variant; comparison table and Pareto plot over all of them."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import compare, log_variant


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Logging in each variant's namespace, then the comparison."""
    names = list(names)
    logging = for_each_variant(
        [
            node(
                log_variant,
                [
                    "name",
                    "model",
                    "corpus",
                    "evaluation",
                    "export",
                    "metrics",
                    "layers",
                    "error_plot",
                    "sparsity_plot",
                    "params:variant",
                    "params:calibration",
                    "params:evaluation",
                    "params:track",
                ],
                "new_run",
                name="log",
            ),
        ],
        names,
    )
    comparing = node(
        compare,
        {
            "scratch": "scratch",
            "track": "params:track",
            **{f"metrics:{name}": f"variants.{name}.metrics" for name in names},
            **{f"new:{name}": f"variants.{name}.new_run" for name in names},
        },
        ["comparison", "pareto_plot"],
        name="compare",
        namespace="variants",
    )
    return logging + Pipeline([comparing])
