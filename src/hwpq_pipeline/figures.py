"""What is told of a variant: each figure's name, and what its seconds are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The seconds of each stage in `metrics.json`: told beside the figures, and no part of a run's content.
TIMES = "seconds"
FIGURES = (
    "perplexity",
    "perplexity_ratio",
    "kl_divergence",
    "top1_agreement",
    "sparsity",
    "size_bytes",
    "compression_ratio",
)


def making_seconds(metrics: Mapping[str, Any]) -> float:
    """Seconds from the dense model to the export: calibrate, select, compress, export."""
    return float(sum(value for stage, value in metrics[TIMES].items() if stage != "evaluate"))
