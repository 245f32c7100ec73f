"""A variant's `metrics.json` and layer table, as the pipelines leave them, for tests of what shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from hwpq_pipeline.figures import FIGURES

#: A figure that is added later has a value here too.
METRICS: dict[str, Any] = {
    **{figure.name: 0.5 for figure in FIGURES if figure.name != "seconds_to_make"},
    "perplexity": 68.1, "perplexity_ratio": 3.3, "dense_perplexity": 20.61, "kl_divergence": 1.28,
    "top1_agreement": 0.48, "coverage": 1.0, "sparsity": 0.5, "size_bytes": 163_227_736, "dense_bytes": 269_060_552,
    "compression_ratio": 1.65, "evaluation_samples": 16, "evaluation_length": 512, "evaluation_predictions": 8176,
    "seconds": {"calibrate": 46.0, "select": 3.0, "compress": 44.0, "export": 1.0, "evaluate": 33.0},
    "peak_rss_bytes": {"calibrate": 1_234_000_000, "select": 900_000_000, "compress": 2_100_000_000},
    "disk_bytes": {"calibrate": 402_600_000, "select": 13_300_000, "compress": 112_800_000},
}  # fmt: skip
#: The same as people read them; the seconds are 46 + 3 + 44 + 1.
SHOWN = {
    "perplexity": "68.10", "perplexity_ratio": "3.300", "kl_divergence": "1.2800", "top1_agreement": "48.0%",
    "coverage": "100.0%", "sparsity": "50.0%", "size_bytes": "163.2", "compression_ratio": "1.65",
    "seconds_to_make": "94",
}  # fmt: skip


def layer_figures(blocks: int = 2, kinds: tuple[str, ...] = ("q_proj", "k_proj")) -> pd.DataFrame:
    """A layer table with errors and sparsities, drawn with seed 0."""
    generator = np.random.default_rng(0)
    table = pd.DataFrame([{"block": block, "kind": kind} for block in range(blocks) for kind in kinds])
    for column in ("error_pruned", "error_recovered", "error_quantized"):
        table[column] = generator.uniform(1e-4, 1e-1, len(table))
    table["wanted_sparsity"] = 0.5
    table["reached_sparsity"] = generator.uniform(0.499, 0.501, len(table))
    return table
