"""The node that says what a run takes, before its stages run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hwpq_pipeline.forecast import forecast
from hwpq_pipeline.parameters import Calibration, Compute, Evaluation, Export, Prompts
from hwpq_pipeline.variant import Variant


def plan(
    model: Path,
    entries: dict[str, Any],
    calibration: Calibration,
    evaluation: Evaluation,
    export: Export,
    report: Prompts,
    compute: Compute,
) -> list[dict[str, Any]]:
    """What each stage of this configuration takes, by the names of `planning.Need`; this machine is timed for it.

    `entries` are the variants', which Kedro hands over plain where no other node of the run takes them, else typed.
    """
    typed = {name: Variant.model_validate(entry).model_dump() for name, entry in entries.items()}
    sections = {
        "calibration": calibration,
        "evaluation": evaluation,
        "export": export,
        "report": report,
        "compute": compute,
    }
    plain = {name: section.model_dump() for name, section in sections.items()}
    return [asdict(need) for need in forecast(model, typed, plain, timed=True)]
