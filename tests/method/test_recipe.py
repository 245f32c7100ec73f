"""Recipes: every number written out, each where it is used, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from hwpq_pipeline import variant
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method import entries as module
from hwpq_pipeline.method.presets import GAIN, PRESETS
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.variant import Variant

TWO_OF_FOUR = {"structure": "2of4"}
DESCENT = {"grid": "int4", "group_size": 64, "method": "coordinate_descent"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp8": {"quantization": {"grid": "fp8_e4m3"}},
    "int4": {"quantization": DESCENT},
    "pruned": {"selection": TWO_OF_FOUR},
    "fixed": {"selection": TWO_OF_FOUR, "recovery": {}},
    "fast": {"selection": TWO_OF_FOUR, "recovery": {"preset": "fast"}, "quantization": DESCENT},
    "quality": {"selection": TWO_OF_FOUR, "recovery": {"preset": "quality"}},
    "ewma": {"selection": {"structure": "unstructured", "sparsity": 0.5}, "recovery": {"preset": "balanced"}},
    "in-sequence": {"quantization": DESCENT, "sequential": True},
    "embeddings": {"quantization": {"grid": "fp8_e4m3", "embeddings": "int8"}},
}


def resolved(entry: dict[str, Any]) -> Recipe:
    return Recipe.from_variant(Variant(description="d", **entry).model_dump())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_survives_json(name: str) -> None:
    recipe = resolved(VARIANTS[name])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_what_a_preset_stands_for_is_written_out() -> None:
    assert resolved(VARIANTS["fast"]).to_json() == {
        "selection": {
            "structure": "2of4", "metric": "hwpq_weighted", "sparsity": None, "multiplier": None, "domain": None,
            "alpha": None, "beta": None, "scope": None,
        },
        "recovery": {
            "preset": "fast", "method": "descent", "damping": 0.01, "steps": None, "rounds": 2, "sweeps": 1,
        },
        "quantization": {
            "grid": "int4", "method": "coordinate_descent", "group_size": 64, "sweeps": 4, "damping": 0.01,
        },
        "sequence": None,
    }  # fmt: skip


def test_a_layer_in_sequence_is_damped_more_everywhere() -> None:
    recipe = resolved({**VARIANTS["quality"], "quantization": DESCENT})
    assert recipe.recovery
    assert recipe.quantization
    assert recipe.sequence
    assert {recipe.recovery.damping, recipe.quantization.damping, recipe.sequence.damping} == {0.3}
    assert recipe.sequence.steps == 8


def test_what_the_variant_says_wins() -> None:
    recipe = resolved(
        {
            "selection": {"structure": "unstructured", "multiplier": 4.0, "alpha": 0.125, "domain": "raw"},
            "recovery": {"steps": 3, "damping": 0.0},
            "quantization": {**DESCENT, "sweeps": 1},
        }
    )
    assert recipe.selection
    assert recipe.recovery
    assert recipe.quantization
    assert (recipe.selection.alpha, recipe.selection.beta, recipe.selection.domain) == (0.125, GAIN, "raw")
    assert (recipe.recovery.steps, recipe.recovery.damping, recipe.quantization.damping) == (3, 0.0, 0.0)
    assert recipe.quantization.sweeps == 1


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        (("PRESETS", {**PRESETS, "fast": replace(PRESETS["fast"], sweeps=7)}), {"fast"}),
        (("PRESETS", {**PRESETS, "fixed_mask": replace(PRESETS["fixed_mask"], steps=7)}), {"fixed"}),
        (("DAMPING", 0.02), {"int4", "fixed", "fast", "ewma"}),
        (("SEQUENTIAL_DAMPING", 0.2), {"quality", "in-sequence"}),
        (("CORRECTION_STEPS", 9), {"quality", "in-sequence"}),
        (("GAIN", 1 / 64), {"ewma"}),
        (("ROUNDING_SWEEPS", 5), {"int4", "fast", "in-sequence"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_changed_number_changes_the_recipes_that_use_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch, change: tuple[str, Any], affected: set[str]
) -> None:
    before = {name: resolved(entry) for name, entry in VARIANTS.items()}
    monkeypatch.setattr(module, *change)
    assert {name for name, entry in VARIANTS.items() if resolved(entry) != before[name]} == affected


def test_data_is_asked_for_where_it_is_used() -> None:
    found = {name: (resolved(entry).needs_text, resolved(entry).needs_gram) for name, entry in VARIANTS.items()}
    assert {name for name, (text, _) in found.items() if not text} == {"dense", "fp8", "embeddings"}
    assert {name for name, (_, gram) in found.items() if gram} == {"int4", "fixed", "fast", "ewma"}


@pytest.mark.parametrize(
    "damage", [{"recovery": {"preset": "fast"}}, {"unknown": None}, {"quantization": 3}, {"sequence": {"steps": 8}}]
)
def test_what_is_no_recipe_is_refused_in_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(HwpqError, match="not a recipe"):
        Recipe.from_json({**Recipe().to_json(), **damage})


def test_presets_are_those_that_the_configuration_takes() -> None:
    annotation = variant.Recovery.model_fields["preset"].annotation
    words = {word for part in get_args(annotation) for word in get_args(part)}
    assert words == set(PRESETS)
