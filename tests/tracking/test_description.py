"""A run's words and curves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hwpq_pipeline.tracking.description import describe, layer_series
from tests.reported import METRICS, SHOWN


def test_the_figures_and_the_model_stand_in_the_description():
    text = describe("Words.", METRICS, export="data/07_export/x", digest="ab" * 32, command="dvc repro evaluate@x")
    for part in ("Words.", *(f"| {shown} |" for shown in SHOWN.values()), "data/07_export/x", "ab" * 8, "@x"):
        assert part in text
    heads, rule, row = (line.count("|") for line in text.splitlines() if line.startswith("|"))
    assert heads == rule == row


def test_a_curve_a_kind_and_stage_in_the_order_of_blocks_without_gaps():
    layers = pd.DataFrame(
        {
            "block": [1, 0, 0],
            "kind": ["q", "q", "k"],
            "error_pruned": [np.nan] * 3,
            "error_recovered": [0.2, np.nan, np.nan],
            "error_quantized": [0.3, 0.1, 0.5],
            "reached_sparsity": [0.0, 0.5, 0.25],
        }
    )
    assert layer_series(layers) == {
        "error_recovered/q": [(1, 0.2)],
        "error_quantized/q": [(0, 0.1), (1, 0.3)],
        "error_quantized/k": [(0, 0.5)],
        "sparsity/q": [(0, 0.5), (1, 0.0)],
        "sparsity/k": [(0, 0.25)],
    }
