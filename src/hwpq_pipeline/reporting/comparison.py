"""The variants side by side: a table for files, and one for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import rich
from rich.console import Console
from rich.table import Table

from hwpq_pipeline.figures import FIGURES, making_seconds

TABLE_WIDTH = 140


def comparison_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row a variant.

    Args:
        metrics: by variant, as in its `metrics.json`.

    Returns:
        Columns `variant`, those of `FIGURES`, and `seconds`: the sum over the stages that made the variant
        (calibrate, select, compress, export), evaluation left out.
    """
    return pd.DataFrame(
        [
            {"variant": name, **{figure: values[figure] for figure in FIGURES}, "seconds": making_seconds(values)}
            for name, values in metrics.items()
        ]
    )


def console() -> Console:
    """Where to print. A pipe counts as 80 columns, which would cut every head short."""
    here = rich.get_console()
    return here if here.is_terminal else Console(width=TABLE_WIDTH)


def show_table(table: pd.DataFrame) -> None:
    """Print the table."""
    view = Table(title="Compressed variants")
    heads = {
        "variant": "variant",
        "perplexity": "perplexity",
        "perplexity_ratio": "× dense",
        "kl_divergence": "KL (nats)",
        "top1_agreement": "top-1 agreement",
        "sparsity": "sparsity",
        "size_bytes": "MB on disk",
        "compression_ratio": "× smaller",
        "seconds": "seconds to make",
    }
    for head in heads.values():
        view.add_column(head, justify="left" if head == "variant" else "right")
    for row in table.to_dict("records"):
        view.add_row(
            str(row["variant"]),
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['kl_divergence']:.4f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['sparsity']:.1%}",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['compression_ratio']:.2f}",
            f"{row['seconds']:.0f}",
        )
    console().print(view)
