"""dense model, corpus → calibration samples, activation statistics."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.forgetting import forgetting

from .nodes import collect, draw_calibration


def create_pipeline() -> Pipeline:
    """Sampling, then one forward pass over the samples."""
    return Pipeline(
        [
            node(
                draw_calibration, ["model", "documents", "params:calibration"], "calibration", name="draw_calibration"
            ),
            node(
                collect,
                ["model", "calibration", "params:calibration", "params:compute", "work"],
                ["statistics", "calibrate_measured"],
                name="collect_statistics",
            ),
            forgetting("calibrate", ["statistics", "calibrate_measured"]),
        ]
    )
