"""Nodes that learn what the layers' inputs look like, once for all variants."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.parameters import Calibration, Compute
from hwpq_pipeline.progress import progress_bar


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
    scratch: Path,
) -> tuple[Path, Measured]:
    """Gram matrices (or their diagonals) of every distinct linear input, and what that took."""
    measuring = Measuring("calibrate")
    target = scratch / "statistics"
    with progress_bar("calibrate: decoder blocks") as progress:
        collect_statistics(
            model,
            token_matrix(samples),
            target=target,
            mode=calibration.mode,
            dtype=calibration.dtype,
            batch=calibration.batch,
            every_expert=calibration.all_experts,
            device=choose_device(compute.device, tf32=compute.tf32, where="calibrate"),
            progress=progress,
        )
    return target, measuring.end(target)
