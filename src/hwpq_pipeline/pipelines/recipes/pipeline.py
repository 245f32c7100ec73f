"""variants → recipes in plain numbers.

The record of what each variant stands for, and what DVC compares: its stages `select` and `compress` depend on a
variant's recipe and not on its entry. So a changed default or preset makes exactly the variants stale whose recipe it
changes, and a changed description none. The nodes of `select` and `compress` resolve the entry themselves, so that no
older recipe on disk can stand between the configuration and a result.
"""

from __future__ import annotations

from collections.abc import Iterable

from kedro.pipeline import Pipeline, node

from hwpq_pipeline.pipelines.variants import for_each_variant

from .nodes import resolve


def create_pipeline(names: Iterable[str]) -> Pipeline:
    """One node a variant."""
    return for_each_variant([node(resolve, "params:variant", "recipe", name="resolve_recipe")], names)
