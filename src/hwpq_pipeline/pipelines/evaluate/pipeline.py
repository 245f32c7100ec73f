"""export, the dense model's answer → metrics and layer table, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.forgetting import forgetting_of_variant
from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import evaluate, report


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Evaluation of the export, then all that is known about the variant in one place."""
    return for_each_variant(
        [
            node(
                evaluate,
                ["export", "model", "reference", "evaluation", "params:evaluation", "name", "work"],
                ["quality", "evaluate_measured"],
                name="evaluate",
            ),
            node(
                report,
                [
                    "quality",
                    "selected_layers",
                    "compressed_layers",
                    "fetch_measured",
                    "calibrate_measured",
                    "reference_measured",
                    "select_measured",
                    "compress_measured",
                    "export_measured",
                    "formats_measured",
                    "evaluate_measured",
                ],
                ["metrics", "layers"],
                name="report",
            ),
            forgetting_of_variant("evaluate", ["metrics", "layers"]),
        ],
        names,
    )
