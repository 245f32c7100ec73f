"""dense model, corpus → evaluation samples, the dense model's answer.

A pipeline of its own so that another number of evaluation tokens recomputes no statistics and no variant.
"""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.forgetting import forgetting

from .nodes import draw_evaluation, refer


def create_pipeline() -> Pipeline:
    """Sampling, then one forward pass of the dense model."""
    return Pipeline(
        [
            node(draw_evaluation, ["model", "documents", "params:evaluation"], "evaluation", name="draw_evaluation"),
            node(
                refer,
                ["model", "evaluation", "params:evaluation", "work"],
                ["reference", "reference_measured"],
                name="make_reference",
            ),
            forgetting("reference", ["reference", "reference_measured"]),
        ]
    )
