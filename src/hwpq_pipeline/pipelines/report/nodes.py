"""The node that writes the report."""

from __future__ import annotations

from typing import Any

import yaml

from hwpq_pipeline.parameters import Calibration, Evaluation, Variant
from hwpq_pipeline.pipelines.variants import by_variant
from hwpq_pipeline.reporting.comparison import comparison_table
from hwpq_pipeline.reporting.page import Reported, render


def page(
    entries: dict[str, Any],
    calibration: Calibration,
    evaluation: Evaluation,
    **tables: Any,
) -> str:
    """The report as HTML.

    Args:
        entries: the variants' configuration; of Kedro, plain where no other node of the run takes it, else typed.
        calibration: what the figures depend on.
        evaluation: likewise.
        tables: metrics, layers and continuations of each variant, keyed as `by_variant` reads them.
    """
    layers, continuations = by_variant(tables, "layers"), by_variant(tables, "continuations")
    typed = {name: Variant.model_validate(entry) for name, entry in entries.items()}
    variants = [
        Reported(
            name=name,
            description=variant.description,
            recipe=yaml.safe_dump({name: variant.model_dump(exclude_unset=True)}, sort_keys=False, allow_unicode=True),
            layers=layers[name],
            continuations=continuations[name],
            command=f"dvc repro evaluate@{name}",
        )
        for name, variant in typed.items()
    ]
    conditions = {
        "calibrated on": f"{calibration.samples} × {calibration.length} tokens, seed {calibration.seed}",
        "evaluated on": f"{evaluation.samples} × {evaluation.length} tokens, seed {evaluation.seed}",
    }
    return render(comparison_table(by_variant(tables, "metrics")), variants, conditions=conditions)
