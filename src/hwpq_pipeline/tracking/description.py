"""A run's words and curves: the headline figures in Markdown, and each layer's figures by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

#: Column of the layer table, name of the curve; a slash makes a section of charts in the MLflow UI.
CURVES = (
    ("error_pruned", "error_pruned"),
    ("error_recovered", "error_recovered"),
    ("error_quantized", "error_quantized"),
    ("reached_sparsity", "sparsity"),
)


def describe(words: str, metrics: Mapping[str, Any], *, export: str, digest: str, command: str) -> str:
    """What stands above a run.

    Args:
        words: the variant's own description.
        metrics: as in its `metrics.json`.
        export: where the exported model lies, relative to the project.
        digest: sha256 of it.
        command: that makes it again.
    """
    return f"""\
{words}

| perplexity | × dense | KL, nats a token | top-1 agreement | sparsity | MB on disk | × smaller |
|---|---|---|---|---|---|---|
| **{metrics["perplexity"]:.2f}** | **{metrics["perplexity_ratio"]:.3f}** | {metrics["kl_divergence"]:.4f} \
| **{metrics["top1_agreement"]:.1%}** | {metrics["sparsity"]:.1%} | **{metrics["size_bytes"] / 1e6:.1f}** \
| {metrics["compression_ratio"]:.2f} |

- Model: `{export}`, sha256 `{digest[:16]}…`, loads with `AutoModelForCausalLM.from_pretrained("{export}")`
- Made again by `{command}` in this run's commit
- Layer by layer: artifacts `error_by_layer.png` and `layers.csv`, and the metrics with a step a block
"""


def layer_series(layers: pd.DataFrame) -> dict[str, list[tuple[int, float]]]:
    """Curves by name, `error_quantized/q_proj`: (block, value), where there is a value.

    Args:
        layers: the layer table: `block`, `kind`, and the columns of `CURVES`.
    """
    series = {}
    for column, name in CURVES:
        known = layers[layers[column].notna()]
        for kind, rows in known.groupby("kind", sort=False):
            rows = rows.sort_values("block")
            series[f"{name}/{kind}"] = [
                (int(block), float(value)) for block, value in zip(rows["block"], rows[column], strict=True)
            ]
    return series
