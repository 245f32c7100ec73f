"""Nodes that log every variant to MLflow."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.inert import masked
from hwpq_pipeline.parameters import Calibration, Evaluation, Track
from hwpq_pipeline.pipelines.variants import by_variant
from hwpq_pipeline.reporting.comparison import console, show_table
from hwpq_pipeline.tracking.connection import resolve_uri
from hwpq_pipeline.tracking.description import describe, layer_series
from hwpq_pipeline.tracking.models import log_model
from hwpq_pipeline.tracking.records import Dataset, Record
from hwpq_pipeline.tracking.runs import log_once
from hwpq_pipeline.variant import Variant


def record(  # noqa: PLR0913 (a node gets one for each dataset)
    name: str,
    sources: dict[str, dict[str, Any]],
    calibration_samples: pd.DataFrame,
    evaluation_samples: pd.DataFrame,
    export: Path,
    metrics: dict[str, Any],
    layers: pd.DataFrame,
    error_plot: Path,
    sparsity_plot: Path,
    variant: Variant,
    calibration: Calibration,
    evaluation: Evaluation,
) -> Record:
    """Collect all that is logged for one variant."""
    digests = {
        **{source: found["sha256"] for source, found in sources.items()},
        "calibration": _digest(calibration_samples),
        "evaluation": _digest(evaluation_samples),
        "export": sha256_directory(export),
    }
    command = f"dvc repro evaluate@{name}"
    # Relative to the project, which Kedro makes the working directory: a run says the same wherever it was made.
    place = os.path.relpath(export)
    return Record(
        variant=name,
        parameters={
            # What made this export. The configuration may have changed since.
            **read_json(export / "recipe.json")["recipe"],
            "calibration": calibration.model_dump(),
            "evaluation": evaluation.model_dump(),
        },
        metrics=metrics,
        digests=digests,
        series=layer_series(layers),
        datasets=_datasets(sources, digests, calibration, evaluation),
        files=(error_plot, sparsity_plot, export / "README.md"),
        texts={"metrics.json": json.dumps(metrics, indent=2), "layers.csv": layers.to_csv(index=False)},
        tags={"command": command, "export": place},
        description=describe(variant.description, metrics, export=place, digest=digests["export"], command=command),
    )


def log(recorded: Record, export: Path, track: Track) -> bool:
    """Log one variant unless its content is logged already, and say whether the run is new."""
    uri = resolve_uri(track.tracking_uri)
    run_id, new = log_once(recorded, experiment=track.experiment, tracking_uri=uri)
    if track.log_model:
        log_model(run_id, export, recorded.variant, tracking_uri=uri)
    return new


def announce(comparison: pd.DataFrame, track: Track, **new_runs: bool) -> None:
    """Print the comparison, and where to look at the runs.

    Args:
        comparison: the table.
        track: names the experiment.
        new_runs: whether each variant's run is new, keyed as `by_variant` reads them.
    """
    show_table(comparison)
    console().print(
        f"{sum(by_variant(new_runs, 'new_run').values())} new runs in MLflow experiment {track.experiment!r}. Compare "
        f"them with `make ui`, or: mlflow ui --backend-store-uri {masked(resolve_uri(track.tracking_uri))}",
        soft_wrap=True,
    )


def _digest(samples: pd.DataFrame) -> str:
    return hashlib.sha256(token_matrix(samples).tobytes()).hexdigest()


def _datasets(
    sources: dict[str, dict[str, Any]], digests: dict[str, str], calibration: Calibration, evaluation: Evaluation
) -> list[Dataset]:
    """What the variant was made from and judged on."""
    model, corpus = sources["model"]["source"], sources["corpus"]["source"]
    return [
        Dataset(str(model.get("name")), digests["model"], "model", model),
        *(
            Dataset(
                f"{corpus.get('name')}: {part}",
                digests[part],
                part,
                {**corpus, "sha256.corpus": digests["corpus"]},
                {"samples": values.samples, "length": values.length, "seed": values.seed},
            )
            for part, values in (("calibration", calibration), ("evaluation", evaluation))
        ),
    ]
