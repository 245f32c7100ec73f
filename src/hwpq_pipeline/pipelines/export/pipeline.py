"""dense model, codes and scales → a checkpoint that engines load, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import export_formats, export_variant

MADE_FROM = ("model", "corpus", "compressed", "name", "params:variant.description", "params:calibration")


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """For every variant the checkpoint that is evaluated, and the further formats that are asked for."""
    return for_each_variant(
        [
            node(
                export_variant,
                [
                    "model",
                    "corpus",
                    "compressed",
                    "name",
                    "params:variant.description",
                    "params:calibration",
                    "scratch",
                ],
                ["export", "export_measured"],
                name="export",
            ),
            node(
                export_formats,
                [*MADE_FROM, "params:export", "scratch"],
                ["formats", "formats_measured"],
                name="export_formats",
            ),
        ],
        names,
    )
