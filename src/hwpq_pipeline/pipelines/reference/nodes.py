"""Nodes that fix what variants are measured against: the tokens, and the dense model's answer to them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.evaluation.quality import make_reference
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.parameters import Evaluation
from hwpq_pipeline.progress import progress_bar


def draw_evaluation(model: Path, documents: pd.DataFrame, evaluation: Evaluation) -> pd.DataFrame:
    """Token samples from the documents that evaluate."""
    return draw_samples(
        documents, model, split="evaluation", samples=evaluation.samples, length=evaluation.length, seed=evaluation.seed
    )


def refer(model: Path, samples: pd.DataFrame, evaluation: Evaluation, scratch: Path) -> tuple[Path, Measured]:
    """What the divergence of any variant needs of the dense model on the evaluation tokens, and what that took."""
    measuring = Measuring("reference")
    target = scratch / "reference"
    with progress_bar("reference: decoder blocks") as progress:
        make_reference(
            model, token_matrix(samples), target, batch=evaluation.batch, dtype=evaluation.dtype, progress=progress
        )
    return target, measuring.end(target)
