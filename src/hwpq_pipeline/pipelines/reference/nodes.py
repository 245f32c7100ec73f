"""Nodes that fix what variants are measured against: the tokens, and the dense model's answer to them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.evaluation.quality import make_reference
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.parameters import Evaluation
from hwpq_pipeline.progress import progress_bar
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import open_work, result_folder


def draw_evaluation(model: Path, documents: pd.DataFrame, evaluation: Evaluation) -> pd.DataFrame:
    """Token samples from the documents that evaluate."""
    return draw_samples(
        documents, model, split="evaluation", samples=evaluation.samples, length=evaluation.length, seed=evaluation.seed
    )


def refer(model: Path, samples: pd.DataFrame, evaluation: Evaluation, work: Path) -> tuple[Path, Measured]:
    """What the divergence of any variant needs of the dense model on the evaluation tokens, and what that took."""
    measuring = Measuring("reference")
    tokens, how = token_matrix(samples), evaluation.model_dump(include={"batch", "dtype"})
    folder = open_work(work, "reference", work_key({"model": model}, tokens=tokens_digest(tokens), **how))
    target = result_folder(folder)
    with progress_bar("reference: decoder blocks") as progress:
        make_reference(model, tokens, target, **how, progress=progress, milestones=Milestones(folder / "states"))
    return target, measuring.end(target)
