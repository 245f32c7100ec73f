"""export, prompts → continued prompts, for every variant.

It is a pipeline of its own, so that a changed prompt evaluates nothing again.
"""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import write


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One node a variant."""
    return for_each_variant(
        [node(write, ["export", "params:report", "params:evaluation"], "continuations", name="write")], names
    )
