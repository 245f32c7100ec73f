"""The node that writes a variant's recipe down."""

from __future__ import annotations

from typing import Any

from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.variant import Variant


def resolve(variant: Variant) -> dict[str, Any]:
    """The variant with every number written out, those of its preset and those left to a default included."""
    return Recipe.from_variant(variant.model_dump()).to_json()
