"""Nodes that judge a variant by its export, and put together what is known about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.evaluation.quality import evaluate_export, load_reference
from hwpq_pipeline.evaluation.size import measure_size
from hwpq_pipeline.measuring import Measured, Measuring, tables
from hwpq_pipeline.parameters import Evaluation
from hwpq_pipeline.progress import progress_bar


def evaluate(
    export: Path,
    model: Path,
    reference: Path,
    samples: pd.DataFrame,
    evaluation: Evaluation,
) -> tuple[dict[str, Any], Measured]:
    """Load the export as a user would; its figures beside the dense model's, and what that took.

    `model_sparsity` stands beside the figures, and `left_dense` where a part of the blocks was not compressed.
    """
    measuring = Measuring("evaluate")
    with progress_bar(f"evaluate {export.name}: decoder blocks") as progress:
        quality = evaluate_export(
            export,
            load_reference(reference),
            token_matrix(samples),
            model_dir=model,
            batch=evaluation.batch,
            dtype=evaluation.dtype,
            progress=progress,
        )
    conditions = {
        "evaluation_samples": evaluation.samples,
        "evaluation_length": evaluation.length,
        "evaluation_predictions": quality.tokens,
    }
    size = measure_size(export, model)
    told = {"model_sparsity": size.model_sparsity, **conditions}
    figures: dict[str, Any] = {**quality.figures(), **size.figures(), **told}
    if size.left_dense:
        figures["left_dense"] = size.left_dense
    return figures, measuring.end()


def report(
    figures: dict[str, Any], selected: pd.DataFrame, compressed: pd.DataFrame, *measured: Measured
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Put together what is known about a variant: its figures with what each stage took, and its layers."""
    identity = [column for column in compressed.columns if column in selected.columns]
    return {**figures, **tables(measured)}, selected.merge(compressed, on=identity, validate="one_to_one")
