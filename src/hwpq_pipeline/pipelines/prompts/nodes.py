"""The node that lets a variant write."""

from __future__ import annotations

from pathlib import Path

from hwpq_pipeline.evaluation.continuations import continue_prompts
from hwpq_pipeline.parameters import Evaluation, Prompts


def write(export: Path, prompts: Prompts, evaluation: Evaluation) -> list[dict[str, str]]:
    """Continue the prompts with the export, in the dtype that it is evaluated with."""
    return continue_prompts(export, prompts.prompts, new_tokens=prompts.new_tokens, dtype=evaluation.dtype)
