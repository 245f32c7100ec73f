"""The shipped configuration is valid, and contradictions are refused with what to do."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hwpq_pipeline.configuration import mistakes
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.parameters import Calibration, Compute, Corpus, Evaluation, Execution, Export, Model, Prompts, Track
from hwpq_pipeline.pipelines.gate.limits import Gate, QualityGates
from hwpq_pipeline.variant import LayerSettings, Quantization, Recovery, Selection, Variant

SHARED: dict[str, type[BaseModel]] = {
    "model": Model,
    "corpus": Corpus,
    "calibration": Calibration,
    "compute": Compute,
    "execution": Execution,
    "evaluation": Evaluation,
    "export": Export,
    "track": Track,
    "report": Prompts,
}


def read(root: Path, name: str) -> Any:
    return yaml.safe_load((root / "conf" / name).read_text())


@pytest.mark.parametrize("env", ["base", "ci"])
def test_shipped_configuration_is_valid(root, env):
    parameters = read(root, f"{env}/parameters.yml")
    for name, values in parameters.items():
        SHARED[name].model_validate(values)
    for values in read(root, f"{env}/parameters_variants.yml")["variants"].values():
        Variant.model_validate(values)


@pytest.mark.parametrize("env", ["base", "ci"])
def test_gates_are_valid_and_name_the_variants_that_there_are(root, env):
    gates = QualityGates.model_validate(read(root, f"{env}/quality_gates.yml")["quality_gates"])
    assert set(gates.variants) == set(read(root, f"{env}/parameters_variants.yml")["variants"])


@pytest.mark.parametrize("env", ["base", "ci"])
def test_no_two_variants_are_one_recipe(root: Path, env: str) -> None:
    """A row of the comparison that another row repeats costs its time and says nothing."""
    entries = read(root, f"{env}/parameters_variants.yml")["variants"]
    recipes = {name: Recipe.from_variant(entry) for name, entry in entries.items()}
    same = [(one, other) for one, other in combinations(recipes, 2) if recipes[one] == recipes[other]]
    assert not same
    assert recipes["dense"] == Recipe()


def test_the_shipped_parameters_have_every_section(root: Path) -> None:
    assert set(read(root, "base/parameters.yml")) == set(SHARED)


def test_parameters_are_frozen():
    recovery: Any = Recovery()  # mypy sees that it is frozen
    with pytest.raises(ValidationError, match="frozen"):
        recovery.steps = 7


TWO_OF_FOUR = {"structure": "2of4"}


@pytest.mark.parametrize("env", ["base", "ci"])
def test_shared_parameters_are_written_out_in_full(root, env):
    """DVC sees values in YAML and no defaults in code, so what a field falls back to must stand there."""
    for name, values in read(root, f"{env}/parameters.yml").items():
        fields = SHARED[name].model_fields
        needed = {field for field, info in fields.items() if info.is_required() or info.default is not None}
        assert needed <= set(values), f"{name}: {needed - set(values)}"


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (Selection, {"structure": "2of4", "sparsity": 0.5}, "remove sparsity"),
        (Selection, {"structure": "2of4", "alpha": 0.1}, "alpha belong to structure unstructured"),
        (Selection, {"structure": "unstructured"}, "exactly one of sparsity and multiplier; given: neither"),
        (Selection, {"structure": "unstructured", "sparsity": 0.5, "multiplier": 1.0}, "sparsity and multiplier"),
        (Selection, {"structure": "unstructured", "sparsity": 1.5}, "less than 1"),
        (Selection, {"structure": "2of4", "metrics": "wanda"}, "Extra inputs are not permitted"),
        (Quantization, {"grid": "int4"}, "needs group_size"),
        (Quantization, {"grid": "int4", "group_size": 48}, "needs group_size .32 or 64 or 128"),
        (Quantization, {"grid": "int5", "group_size": 64}, "'int5' is none of 'fp8_e4m3', 'fp8_e5m2'"),
        (Quantization, {"grid": "fp8_e4m3", "group_size": 64}, "remove group_size"),
        (Quantization, {"grid": "int8", "method": "coordinate_descent"}, "rounds to nearest"),
        (Quantization, {"grid": "int4", "group_size": 64, "sweeps": 3}, "sweeps belongs to"),
        (Quantization, {"grid": "nvfp4", "group_size": 32}, "needs group_size .16"),
        (Quantization, {"grid": "int8", "embeddings": "int4"}, "'int4' is none of 'none', 'fp8', 'int8'"),
        (LayerSettings, {"match": ["x"], "quantization": {"grid": "int8", "embeddings": "fp8"}}, "remove them here"),
        (Recovery, {"preset": "quality", "steps": 9}, "steps belongs to preset fixed_mask"),
        *(
            (kind, {**given, name: value}, "(less|greater) than or equal to|a finite number")
            for kind, given, name in (
                (Selection, {"structure": "unstructured"}, "multiplier"),
                (Recovery, {"preset": "fast"}, "damping"),
            )
            for value in (float("inf"), float("-inf"), float("nan"), 1e308, -1)
        ),
        (Gate, {"minimum_coverage": 99}, "less than or equal to 1"),
        (Variant, {"description": "x", "recovery": {}}, "add selection or remove recovery"),
        (
            Variant,
            {"description": "x", "selection": TWO_OF_FOUR, "recovery": {"preset": "quality"}, "sequential": False},
            "preset quality compresses layers in sequence",
        ),
        (Model, {"kind": "hub", "name": "x"}, "needs repo"),
        (Model, {"kind": "directory", "name": "x", "path": "p", "repo": "r"}, "does not take repo"),
        (Model, {"kind": "floppy", "name": "x"}, "'floppy' is none of 'wheel_gguf', 'gguf'"),
        (Corpus, {"kind": "local", "name": "x"}, "needs path"),
        (Gate, {"maximum_perplexity": 3}, "Extra inputs are not permitted"),
        (Gate, {"minimum_top1_agreement": 90}, "less than or equal to 1"),
        (Export, {"formats": ["ggml"]}, "'gguf', 'gguf-f16'"),
        (Calibration, {"samples": 1, "length": 8, "seed": 0, "mode": "diagonal", "keep": "sums"}, "remove keep"),
        (Calibration, {"samples": 0, "length": 512, "seed": 0}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(model, values, message):
    with pytest.raises(ValidationError, match=message):
        model.model_validate(values)


@pytest.mark.parametrize("value", [{"tokens": True}, {"minutes": False}, {"seed": True}])
def test_true_and_false_are_no_numbers(value: dict[str, bool]) -> None:
    """YAML's `yes` and `on` are true, which would be the number 1."""
    with pytest.raises(ValidationError, match="stands where something else is wanted"):
        Variant.model_validate({"description": "d", "quantization": {"grid": "int8"}, "healing": value})
    assert Variant.model_validate({"description": "d", "quantization": {"grid": "int8"}, "sequential": True}).sequential


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"healing": True}, "variants.mine.healing: true stands where something else is wanted"),
        ({"healing": "yes please"}, "variants.mine.healing: not a section. Write its keys below it, or `{}` for all"),
        ({"ignore": "re:.*"}, "variants.mine.ignore: not a list. Write it in brackets: `[…]`"),
        (
            {"budget": {"ratio": 0.5, "choices": "int8"}},
            "variants.mine.budget.choices: not a list. Write it in brackets",
        ),
    ],
)
def test_a_wrong_shape_is_told_in_the_words_of_yaml(changes: dict[str, Any], line: str) -> None:
    entry = {"description": "d", "quantization": {"grid": "int8"}, **changes}
    assert any(line in str(error) for error in mistakes({"variants": {"mine": entry}}, "base"))
