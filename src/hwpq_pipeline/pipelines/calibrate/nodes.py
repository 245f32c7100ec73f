"""Nodes that learn what the layers' inputs look like, once for all variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype
from hwpq_pipeline.execution.engines import current
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.parameters import Calibration, Compute
from hwpq_pipeline.progress import progress_bar
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import open_work


def draw_calibration(model: Path, documents: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """Token samples from the documents that calibrate."""
    return draw_samples(
        documents,
        model,
        split="calibration",
        samples=calibration.samples,
        length=calibration.length,
        seed=calibration.seed,
    )


def collect(
    model: Path,
    samples: pd.DataFrame,
    calibration: Calibration,
    compute: Compute,
    work: Path,
) -> tuple[Path, Measured]:
    """Gram matrices (or their diagonals alone) of every distinct linear input, and what that took."""
    measuring = Measuring("calibrate")
    tokens, device = token_matrix(samples), choose_device(compute.device, tf32=compute.tf32, where="calibrate")
    settings: dict[str, Any] = calibration.model_dump(include={"mode", "keep", "dtype", "batch"})
    settings["every_expert"] = calibration.all_experts
    key = work_key(
        {"model": model},
        tokens=tokens_digest(tokens),
        device=str(device),
        tf32=compute.tf32,
        engine=type(current()).__name__,  # each leaves its states in its own form
        **settings | {"dtype": dtype_name(resolve_dtype(calibration.dtype, device, where="calibration.dtype"))},
    )
    folder = open_work(work, "calibrate", key)
    with progress_bar("calibrate: decoder blocks") as progress:
        target = collect_statistics(
            model,
            tokens,
            target=folder / "result",
            **settings,
            device=device,
            progress=progress,
            work=folder,
        )
    return target, measuring.end(target)
