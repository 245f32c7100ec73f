"""A run's words and curves: the figures in Markdown, and each layer's figures by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from hwpq_pipeline.figures import FIGURES, LAYER_FIGURES, cells, values
from hwpq_pipeline.inert import markdown


def describe(words: str, metrics: Mapping[str, Any], *, export: str, digest: str, command: str) -> str:
    """Write what stands above a run.

    Args:
        words: the variant's own description.
        metrics: as in its `metrics.json`.
        export: where the exported model lies, relative to the project.
        digest: its sha256.
        command: the one that makes it again.

    Raises:
        HwpqError: a figure is missing.
    """
    return f"""\
{markdown(words)}

{_row(figure.label for figure in FIGURES)}
{_row("---" for _ in FIGURES)}
{_row(cells(values(metrics, where=export)))}

- Model: `{export}`, sha256 `{digest[:16]}…`. `AutoModelForCausalLM.from_pretrained("{export}")` loads it.
- `{command}` makes it again, in this run's commit.
- Layer by layer: artifacts `error_by_layer.png` and `layers.csv`, and the metrics that have a step for each block.
"""


def layer_series(layers: pd.DataFrame) -> dict[str, list[tuple[int, float]]]:
    """Curves by name, such as `error_quantized/q_proj`: (block, value), where there is a value.

    A slash makes a section of charts in the MLflow UI.

    Args:
        layers: the layer table: `block`, `kind`, and the columns of `LAYER_FIGURES` that have a curve.
    """
    series = {}
    for shown in (figure for figure in LAYER_FIGURES if figure.curve):
        known = layers[layers[shown.column].notna()]
        for kind, rows in known.groupby("kind", sort=False):
            rows = rows.sort_values("block")
            series[f"{shown.curve}/{kind}"] = [
                (int(block), float(value)) for block, value in zip(rows["block"], rows[shown.column], strict=True)
            ]
    return series


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
