"""The measured quality in a model card.

It is not in `card`, which writes the card before the export is evaluated: exporting then does not depend on how figures
(metrics) are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.figures import FIGURES, TIME, Figure


def with_quality(card: str, metrics: Mapping[str, Any] | None) -> str:
    """Put the table of what was measured into a card, before the section on loading.

    Args:
        card: as `render_card` gave it.
        metrics: as in the variant's `metrics.json`, which may be damaged.

    Raises:
        HwpqError: the card has no section on loading, or a figure is missing.
    """
    before, heading, after = card.partition("\n## How to load\n")
    if not heading:
        raise HwpqError("no section on loading", where="model card", remedy="Run the export pipeline again.")
    known = metrics if isinstance(metrics, Mapping) else {}
    known = {name: value for name, value in known.items() if value is not None}
    try:
        rows = [
            f"| {figure.label} | {_dense(figure, known)} | {figure.show(known[figure.name])} | {figure.told} |"
            for figure in FIGURES
            if figure is not TIME  # a card says nothing of the machine that it was made on
        ]
        tokens = f"{known['evaluation_samples']} × {known['evaluation_length']} tokens"
    except KeyError as error:
        raise HwpqError(f"no metric {error}", where="model card", remedy="Run the evaluate pipeline again.") from error
    note = (
        f"Measured on {tokens} of text that calibration did not use, with the compressed-tensors export of these "
        "weights."
    )
    table = "\n".join(["| | dense | this | |", "|---|---|---|---|", *rows])
    return f"{before}\n## Quality\n\n{note}\n\n{table}\n{_left_dense(known)}{heading}{after}"


def _left_dense(metrics: Mapping[str, Any]) -> str:
    """A list of the block weights that were not compressed; empty where all were."""
    lines = metrics.get("left_dense", [])
    if not lines:
        return ""
    listed = "".join(f"- `{line.replace('`', '')}`\n" for line in lines)  # names come from the checkpoint
    return f"\nInside the decoder blocks these weights are as in the dense model:\n\n{listed}"


def _dense(figure: Figure, metrics: Mapping[str, Any]) -> str:
    """The dense model's figure as people read it; empty where there is none."""
    if figure.dense is None:
        return ""
    return figure.show(metrics[figure.dense] if isinstance(figure.dense, str) else figure.dense)
