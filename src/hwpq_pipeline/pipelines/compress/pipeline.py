"""dense model, statistics, calibration tokens, keep-masks → codes and scales, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import prune, quantize, recover


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """Pruning and recovery (lazy), then one walk over the layers that rounds and writes."""
    return for_each_variant(
        [
            node(
                prune,
                ["model", "statistics", "calibration", "masks", "params:variant", "params:compute"],
                "pruned",
                name="prune",
            ),
            node(recover, ["pruned", "params:variant"], "recovered", name="recover"),
            node(
                quantize,
                ["recovered", "name", "params:variant", "scratch"],
                ["compressed", "compressed_layers", "compress_seconds"],
                name="quantize",
            ),
        ],
        names,
    )
