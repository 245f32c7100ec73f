"""The node that writes the report."""

from __future__ import annotations

from typing import Any

import yaml

from hwpq_pipeline.parameters import Calibration, Evaluation
from hwpq_pipeline.reporting.page import Reported, render
from hwpq_pipeline.tracking.comparison import comparison_table


def page(
    entries: dict[str, dict[str, Any]],
    calibration: Calibration,
    evaluation: Evaluation,
    **tables: Any,
) -> str:
    """The report as HTML.

    Args:
        entries: the variants' configuration.
        calibration: what the figures depend on.
        evaluation: likewise.
        tables: `metrics:<variant>`, `layers:<variant>` and `continuations:<variant>`.
    """
    parts: dict[str, dict[str, Any]] = {"metrics": {}, "layers": {}, "continuations": {}}
    for key, value in tables.items():
        kind, _, name = key.partition(":")
        parts[kind][name] = value
    variants = [
        Reported(
            name=name,
            description=entry["description"],
            recipe=yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True),
            layers=parts["layers"][name],
            continuations=parts["continuations"][name],
            command=f"dvc repro evaluate@{name}",
        )
        for name, entry in entries.items()
    ]
    conditions = {
        "calibrated on": f"{calibration.samples} × {calibration.length} tokens, seed {calibration.seed}",
        "evaluated on": f"{evaluation.samples} × {evaluation.length} tokens, seed {evaluation.seed}",
    }
    return render(comparison_table(parts["metrics"]), variants, conditions=conditions)
