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
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import open_work


def evaluate(
    export: Path,
    model: Path,
    reference: Path,
    samples: pd.DataFrame,
    evaluation: Evaluation,
    name: str,
    work: Path,
) -> tuple[dict[str, Any], Measured]:
    """Load the export as a user would; its figures beside the dense model's, and what it took.

    `model_sparsity` stands beside the figures, and `left_dense` where a part of the blocks was not compressed.
    """
    measuring = Measuring("evaluate")
    tokens, how = token_matrix(samples), evaluation.model_dump(include={"batch", "dtype"})
    inputs = {"export": export, "model": model, "reference": reference}
    folder = open_work(work, f"evaluate.{name}", work_key(inputs, tokens=tokens_digest(tokens), **how))
    with progress_bar(f"evaluate {name}: decoder blocks") as progress:
        answer = load_reference(reference)
        quality = evaluate_export(export, answer, tokens, model_dir=model, **how, progress=progress, work=folder)
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
