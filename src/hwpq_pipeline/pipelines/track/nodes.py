"""Nodes that log every variant to MLflow and put them side by side."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.calibration.samples import token_matrix
from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.evaluation.charts import pareto
from hwpq_pipeline.parameters import Calibration, Evaluation, Track, Variant
from hwpq_pipeline.tracking.comparison import comparison_table, show
from hwpq_pipeline.tracking.runs import Record, log_once, resolve_uri


def log_variant(
    name: str,
    model: Path,
    corpus: Path,
    samples: pd.DataFrame,
    export: Path,
    metrics: dict[str, Any],
    layers: pd.DataFrame,
    error_plot: Path,
    sparsity_plot: Path,
    variant: Variant,
    calibration: Calibration,
    evaluation: Evaluation,
    track: Track,
) -> bool:
    """Log one variant unless its content is logged already; whether the run is new."""
    record = Record(
        variant=name,
        parameters={
            "variant": variant.model_dump(),
            "calibration": calibration.model_dump(),
            "evaluation": evaluation.model_dump(),
        },
        metrics=metrics,
        digests={
            "model": sha256_directory(model),
            "corpus": sha256_directory(corpus),
            "evaluation": hashlib.sha256(token_matrix(samples).tobytes()).hexdigest(),
            "export": sha256_directory(export),
        },
        files=(error_plot, sparsity_plot, export / "README.md"),
        texts={"metrics.json": json.dumps(metrics, indent=2), "layers.csv": layers.to_csv(index=False)},
        command=f"dvc repro evaluate@{name}",
        description=_description(variant, metrics),
    )
    _, new = log_once(record, experiment=track.experiment, tracking_uri=resolve_uri(track.tracking_uri))
    return new


def compare(scratch: Path, track: Track, **results: Any) -> tuple[pd.DataFrame, Path]:
    """The comparison table (printed too) and the Pareto plot.

    Args:
        scratch: where the plot is built.
        track: names the experiment.
        results: `metrics:<variant>`, its figures, and `new:<variant>`, whether its run is new.
    """
    by_kind: dict[str, dict[str, Any]] = {"metrics": {}, "new": {}}
    for key, value in results.items():
        kind, _, name = key.partition(":")
        by_kind[kind][name] = value
    table = comparison_table(by_kind["metrics"])
    plot = scratch / "pareto.png"
    pareto(table, plot)
    show(
        table,
        experiment=track.experiment,
        tracking_uri=resolve_uri(track.tracking_uri),
        new_runs=sum(by_kind["new"].values()),
    )
    return table, plot


def _description(variant: Variant, metrics: dict[str, Any]) -> str:
    """Headline figures in Markdown."""
    return (
        f"{variant.description}\n\n"
        f"- perplexity **{metrics['perplexity']:.2f}** ({metrics['perplexity_ratio']:.3f} × dense)\n"
        f"- KL divergence from dense **{metrics['kl_divergence']:.4f}** nats a token, "
        f"top-1 agreement **{metrics['top1_agreement']:.1%}**\n"
        f"- **{metrics['size_bytes'] / 1e6:.1f} MB** on disk ({metrics['compression_ratio']:.2f} × smaller), "
        f"sparsity {metrics['sparsity']:.1%}\n"
    )
