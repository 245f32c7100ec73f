"""The variants side by side: a table for files, and one for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import rich
from rich.console import Console
from rich.table import Table

from hwpq_pipeline.figures import FIGURES, cells, values

TITLE = "Compressed variants"
#: Columns of a pipe: more than any table needs.
WIDE = 1000


def comparison_table(metrics: Mapping[str, Mapping[str, Any] | None]) -> pd.DataFrame:
    """A row a variant: `variant` and the figures.

    Args:
        metrics: by variant, as in its `metrics.json`.

    Raises:
        HwpqError: a figure of a variant is missing.
    """
    rows = [{"variant": name, **values(found, where=f"metrics of {name}")} for name, found in metrics.items()]
    return pd.DataFrame(rows, columns=["variant", *(figure.name for figure in FIGURES)])


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows by column name."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def console() -> Console:
    """Where to print. rich takes a pipe for 80 columns, which would fold or cut every head."""
    here = rich.get_console()
    return here if here.is_terminal else Console(width=WIDE)


def show_table(table: pd.DataFrame) -> None:
    """Print the table that `comparison_table` made."""
    view = Table(title=TITLE)
    view.add_column("variant")
    for figure in FIGURES:
        view.add_column(figure.label, justify="right")
    for row in records(table):
        view.add_row(row["variant"], *cells(row))
    console().print(view)
