"""What changed between two sets of metrics, as a Markdown table for CI.

dvc metrics diff main --all --json | python -m hwpq_pipeline.reporting.changes
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from hwpq_pipeline.figures import FIGURES, TIME, Figure, making_seconds
from hwpq_pipeline.measuring import SECONDS

HEADS = ("variant", "figure", "before", "now", "")


def changes_table(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row for each figure that changed; empty where none did.

    Args:
        differences: as `dvc metrics diff --all --json` gives them: the numbers `old` and `new` by file
            (`…/<variant>/metrics.json`) and name (a stage's seconds are `seconds.<stage>`). One of the numbers is None
            where the metric is new or gone.
    """
    rows = []
    for file, found in sorted(differences.items()):  # DVC's order is another one each time
        variant = PurePosixPath(file).parent.name
        old, new = (_metrics(found, side) for side in ("old", "new"))
        rows += [
            (variant, figure.label, _shown(figure, old), _shown(figure, new), _judged(figure, old, new))
            for figure in FIGURES
            if old.get(figure.name) != new.get(figure.name)
        ]
    lines = [HEADS, tuple("---" for _ in HEADS), *rows] if rows else []
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _metrics(found: Mapping[str, Mapping[str, Any]], side: str) -> dict[str, Any]:
    """One side's metrics by name, with the seconds that making took."""
    metrics = {name: pair[side] for name, pair in found.items() if pair.get(side) is not None}
    prefix = f"{SECONDS}."
    times = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {**metrics, **({TIME.name: making_seconds({SECONDS: times})} if times else {})}


def _shown(figure: Figure, metrics: Mapping[str, Any]) -> str:
    return figure.show(metrics[figure.name]) if figure.name in metrics else "none"


def _judged(figure: Figure, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Whether the change is for the better; empty where it cannot be said, or where people see no change."""
    known = figure.name in old and figure.name in new
    if figure.better is None or not known or _shown(figure, old) == _shown(figure, new):
        return ""
    lower = new[figure.name] < old[figure.name]
    return "better" if lower == (figure.better == "lower") else "worse"


def main() -> None:
    """Read the differences from standard input, and write the table to standard output."""
    sys.stdout.write(changes_table(json.load(sys.stdin)) + "\n")


if __name__ == "__main__":
    main()
