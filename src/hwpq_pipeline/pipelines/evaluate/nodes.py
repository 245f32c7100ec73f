"""Nodes that judge a variant by its export, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.evaluation.continuations import continue_prompts
from hwpq_pipeline.evaluation.quality import evaluate_export, load_reference
from hwpq_pipeline.evaluation.size import measure_size
from hwpq_pipeline.parameters import Evaluation, Report
from hwpq_pipeline.progress import progress_bar
from hwpq_pipeline.reporting.charts import error_by_layer, sparsity_by_layer


def evaluate(
    export: Path,
    model: Path,
    reference: Path,
    samples: pd.DataFrame,
    evaluation: Evaluation,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Load the export as a user would; its figures beside the dense model's, and the seconds it took."""
    with progress_bar(f"evaluate {export.name}: batches") as progress:
        quality = evaluate_export(
            export,
            load_reference(reference),
            token_matrix(samples),
            batch=evaluation.batch,
            dtype=evaluation.dtype,
            progress=progress,
        )
    size = measure_size(export, model)
    figures = {
        "perplexity": quality.perplexity,
        "perplexity_ratio": quality.perplexity_ratio,
        "dense_perplexity": quality.dense_perplexity,
        "kl_divergence": quality.kl_divergence,
        "top1_agreement": quality.top1_agreement,
        "sparsity": size.sparsity,
        "size_bytes": size.size_bytes,
        "dense_bytes": size.dense_bytes,
        "compression_ratio": size.compression_ratio,
        "evaluation_samples": evaluation.samples,
        "evaluation_length": evaluation.length,
        "evaluation_predictions": quality.tokens,
    }
    return figures, {"evaluate": quality.seconds}


def report(
    figures: dict[str, Any], selected: pd.DataFrame, compressed: pd.DataFrame, *seconds: dict[str, float]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Everything that is known of a variant: its figures with the seconds of each stage, and its layers."""
    by_stage = {stage: value for part in seconds for stage, value in part.items()}
    identity = [column for column in compressed.columns if column in selected.columns]
    return {**figures, "seconds": by_stage}, selected.merge(compressed, on=identity, validate="one_to_one")


def plot(layers: pd.DataFrame, scratch: Path) -> tuple[Path, Path]:
    """Output error and reached sparsity, layer by layer."""
    errors, sparsity = scratch / "error_by_layer.png", scratch / "sparsity_by_layer.png"
    error_by_layer(layers, errors)
    sparsity_by_layer(layers, sparsity)
    return errors, sparsity


def write(export: Path, report: Report, evaluation: Evaluation) -> list[dict[str, str]]:
    """What the export makes of the prompts."""
    return continue_prompts(export, report.prompts, new_tokens=report.new_tokens, dtype=evaluation.dtype)
