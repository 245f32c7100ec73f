"""Nodes that put the variants side by side and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.parameters import Calibration, Evaluation
from hwpq_pipeline.pipelines.variants import by_variant
from hwpq_pipeline.reporting.charts import error_by_layer, pareto, sparsity_by_layer
from hwpq_pipeline.reporting.comparison import comparison_table
from hwpq_pipeline.reporting.page import Reported, render
from hwpq_pipeline.reporting.took import what_it_took
from hwpq_pipeline.variant import Variant


def draw(layers: pd.DataFrame, scratch: Path) -> tuple[Path, Path]:
    """Draw a variant's output error and reached sparsity, layer by layer."""
    return (
        error_by_layer(layers, scratch / "error_by_layer.png"),
        sparsity_by_layer(layers, scratch / "sparsity_by_layer.png"),
    )


def compare(scratch: Path, **metrics: dict[str, Any]) -> tuple[pd.DataFrame, Path]:
    """Make the comparison table and the Pareto plot.

    Args:
        scratch: where the plot is built.
        metrics: those of each variant, keyed as `by_variant` reads them.
    """
    table = comparison_table(by_variant(metrics, "metrics"))
    return table, pareto(table, scratch / "pareto.png")


def page(
    comparison: pd.DataFrame,
    entries: dict[str, Any],
    calibration: Calibration,
    evaluation: Evaluation,
    plan: list[dict[str, Any]],
    **tables: Any,
) -> str:
    """Write the report as HTML.

    Args:
        comparison: the table of the variants.
        entries: the variants' configuration; Kedro hands it over plain where no other node of the run takes it, else
            typed.
        calibration: what the figures depend on.
        evaluation: the same.
        plan: what each stage was planned to take.
        tables: recipe, layers, continuations and metrics of each variant, keyed as `by_variant` reads them.
    """
    recipes, layers, continuations = (by_variant(tables, name) for name in ("recipe", "layers", "continuations"))
    typed = {name: Variant.model_validate(entry) for name, entry in entries.items()}
    variants = [
        Reported(
            name=name,
            description=variant.description,
            entry=_as_yaml({name: variant.model_dump(exclude_unset=True)}),
            recipe=_as_yaml({name: Recipe.from_json(recipes[name]).told()}),
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
    took = what_it_took(plan, by_variant(tables, "metrics"))
    return render(comparison, variants, conditions=conditions, took=took)


def _as_yaml(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
