"""dense model, statistics, calibration tokens, keep-masks → codes and scales, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import compress_weights


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One walk over the layers."""
    return for_each_variant(
        [
            node(
                compress_weights,
                ["model", "statistics", "calibration", "masks", "name", "params:variant", "params:compute", "scratch"],
                ["compressed", "compressed_layers", "compress_seconds"],
                name="compress_weights",
            ),
        ],
        names,
    )
