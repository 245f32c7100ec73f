"""metrics, layers, continued prompts → charts of every variant, the comparison, and one page for people.

It waits for no server: all of it is on disk before `track` logs. And nothing is evaluated again for a chart's colour.
"""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant, keyed

from .nodes import compare, draw, page


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """The charts in each variant's namespace; the comparison and the page over all variants."""
    names = list(names)
    charts = for_each_variant([node(draw, ["layers", "scratch"], ["error_plot", "sparsity_plot"], name="draw")], names)
    comparing = node(
        compare,
        {"scratch": "scratch", **keyed(names, "metrics")},
        ["comparison", "pareto_plot"],
        name="compare",
        namespace="variants",
    )
    writing = node(
        page,
        {
            "comparison": "comparison",
            "entries": "params:variants",
            "calibration": "params:calibration",
            "evaluation": "params:evaluation",
            "plan": "plan",
            **keyed(names, "metrics"),
            **keyed(names, "recipe"),
            **keyed(names, "layers"),
            **keyed(names, "continuations"),
        },
        "report",
        name="write_report",
        namespace="variants",
    )
    return charts + Pipeline([comparing, writing])
