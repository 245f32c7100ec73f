"""Where the benchmarks leave what they measured: a JSON file and its table, for people and for `benchmarks.readme`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.writer import write_text

RESULTS = Path(__file__).parent / "results"


def write_results(folder: Path, name: str, report: dict[str, Any], table: str) -> None:
    """`<name>.json` and `<name>.md`, each whole. Called after every row: a run cut short has left what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / f"{name}.md", table)
