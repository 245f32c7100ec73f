"""dense model, statistics, calibration tokens, keep-masks → codes and scales, for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.forgetting import forgetting_of_variant
from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import compress_weights, draw_healing, heal_weights, settled_recipe


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One walk over the layers, and the healing of the whole for the variants that ask for it."""
    return for_each_variant(
        [
            node(settled_recipe, ["params:variant", "choices"], "settled", name="settle_recipe"),
            node(
                compress_weights,
                ["model", "statistics", "calibration", "masks", "name", "settled", "params:compute", "work"],
                ["layerwise", "compressed_layers", "layerwise_measured"],
                name="compress_weights",
            ),
            node(
                draw_healing,
                ["documents", "model", "params:calibration", "params:variant", "name"],
                "healing_tokens",
                name="draw_healing",
            ),
            node(
                heal_weights,
                [
                    "layerwise",
                    "layerwise_measured",
                    "model",
                    "healing_tokens",
                    "params:variant",
                    "params:compute",
                    "name",
                    "work",
                ],
                ["compressed", "compress_measured"],
                name="heal_weights",
            ),
            forgetting_of_variant("compress", ["compressed", "compressed_layers", "compress_measured"], "heal"),
        ],
        names,
    )
