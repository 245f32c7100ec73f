"""Budgets: the sharing against exhaustion, costs against files, and a variant from its entry to an export that fits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.method.allocation import choose_layers
from hwpq_pipeline.method.budget import Option, layer_bytes, share_out
from hwpq_pipeline.method.choices import sections_of
from hwpq_pipeline.method.fitting import misfits
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.method.sections import Choice, Quantization, Selection
from hwpq_pipeline.planning.shapes import read_shapes
from hwpq_pipeline.planning.sizes import export_bytes, out_of_reach, tightest
from hwpq_pipeline.variant import Variant
from tests.export.making import layer_shapes, make_compressed, make_two_of_four
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(16, 48)
CHOICES = ["int8", "int4-32", "int3-32", "2of4-int4-32", "dense"]


def recipe(**budget: Any) -> Recipe:
    entry = {"description": "d", "budget": {"choices": CHOICES, **budget}, "recovery": {"preset": "fast"}}
    return Recipe.from_variant(Variant.model_validate(entry).model_dump())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("budget")
    tiny_checkpoint(root / "model", tiny_config(hidden_size=64, intermediate_size=128), dtype=torch.bfloat16)
    collect_statistics(root / "model", TOKENS, target=root / "statistics", dtype="float32")
    return root


def made(root: Path, plan: Recipe, target: Path) -> Path:
    target.mkdir()
    write_model(root / "model", root / "statistics", plan, target, name="v", tokens=TOKENS)
    return target


# --- the sharing


@pytest.mark.parametrize("seed", range(6))
def test_the_sharing_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = itertools.product(range(5), range(4))
    options = [Option(f"g{g}", f"c{c}", float(rng.integers(1, 40)), float(rng.random())) for g, c in pairs]
    groups = [[one for one in options if one.group == f"g{g}"] for g in range(5)]
    limit = float(sum(np.median([one.cost for one in group]) for group in groups))
    every = [taken for taken in itertools.product(*groups) if sum(one.cost for one in taken) <= limit]
    best = min(sum(one.loss for one in taken) for taken in every)
    found = share_out(options, limit, "v")
    assert found.loss == pytest.approx(best)
    assert found.cost <= limit
    assert found.gap < 1e-6
    assert found.chosen.keys() == {f"g{g}" for g in range(5)}
    assert found.loss == pytest.approx(sum(one.loss for one in options if found.chosen[one.group] == one.choice))


@pytest.mark.parametrize("huge", [10.0, 1e3, 1e6, 1e12])
def test_one_huge_loss_does_not_hide_the_others(huge: float) -> None:
    rng = np.random.default_rng(0)
    pairs = itertools.product(range(40), range(4))
    options = [Option(f"g{g}", f"c{c}", 4.0 - c, float(rng.random()) * 2.0**c / 100) for g, c in pairs]
    plain = share_out(options, 100.0, "v")
    spoiled = [replace(one, loss=huge) if (one.group, one.choice) == ("g3", "c3") else one for one in options]
    found = share_out(spoiled, 100.0, "v")
    assert found.loss <= plain.loss + 0.1
    assert found.gap < 1e-6
    assert found.chosen["g3"] != "c3"


def test_a_limit_that_nothing_fits_in_is_one_line() -> None:
    options = [Option("g", "a", 2e6, 0.0), Option("g", "b", 1e6, 1.0)]
    with pytest.raises(
        HwpqError,
        match=r"v: budget: the smallest choices take [\d,]+ bytes, and the limit leaves [\d,]+ bytes for them",
    ):
        share_out(options, 5e5, "v")
    assert share_out(options, 1e6, "v").chosen == {"g": "b"}


@pytest.mark.parametrize(
    ("grid", "group_size"), [("int8", None), ("int4", 16), ("int3", 16), ("nvfp4", 16), (None, None)]
)
def test_costs_are_the_bytes_of_the_files(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "made", grid, group_size=group_size, bfloat16_scales=True, structure=structure)
    stored = Checkpoint(export_checkpoint(tmp_path / "model", tmp_path / "made", tmp_path / "export"))
    choice = Choice("c", None, None if grid is None else Quantization(grid, "nearest", group_size))
    for layer, shape in layer_shapes().items():
        parts = ("weight", "weight_packed", "weight_scale")
        found = sum(stored.tensor(name).nbytes for part in parts if (name := f"{layer}.{part}") in stored)
        assert layer_bytes(shape, choice, packed=False, dense=2) == found


@pytest.mark.parametrize(("grid", "group_size"), [("int8", None), ("int4", 32), ("int3", 32), ("fp8_e4m3", None)])
def test_packed_costs_are_the_bytes_of_the_packed_files(tmp_path: Path, grid: str, group_size: int | None) -> None:
    from safetensors.torch import load_file

    tiny_checkpoint(tmp_path / "model")
    make_two_of_four(tmp_path / "made", grid, group_size)
    export_semi_structured(tmp_path / "model", tmp_path / "made", tmp_path / "export")
    stored = load_file(tmp_path / "export" / "packed.safetensors")
    choice = Choice("c", Selection("2of4", "hwpq"), Quantization(grid, "nearest", group_size))
    for layer, shape in layer_shapes().items():
        found = sum(stored[f"{layer}.weight_{part}"].nbytes for part in ("kept", "positions", "scale"))
        assert layer_bytes(shape, choice, packed=True, dense=4) == found


# --- the words


def test_every_grid_has_words() -> None:
    for grid in GRIDS.values():
        for size in grid.group_sizes or (None,):
            word = grid.name if size is None else f"{grid.name}-{size}"
            method = "coordinate_descent" if grid.descends else "nearest"
            wanted = {"grid": grid.name, "group_size": size, "method": method}
            assert sections_of(word) == {"selection": None, "quantization": wanted}
            assert sections_of(f"2of4-{word}") == {"selection": {"structure": "2of4"}, "quantization": wanted}
    assert sections_of("dense") == {"selection": None, "quantization": None}
    assert sections_of("2of4") == {"selection": {"structure": "2of4"}, "quantization": None}


@pytest.mark.parametrize("word", ["int4", "int4-48", "int8-32", "2of4-dense", "2of4-", "int8-", "", "int5", "2:4"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(HwpqError, match=r"is no choice.*int4-\(32\|64\|128\)"):
        sections_of(word)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": {"choices": CHOICES}}, "exactly one of size_bytes"),
        ({"budget": {"choices": CHOICES, "ratio": 0.5, "size_bytes": 9}}, "given: size_bytes and ratio"),
        ({"budget": {"choices": ["int8"], "ratio": 0.5}}, "two words or more"),
        ({"budget": {"choices": ["int8", "int8"], "ratio": 0.5}}, "stands there twice"),
        ({"budget": {"choices": ["int8", "int4"], "ratio": 0.5}}, "'int4' is no choice"),
        ({"budget": {"choices": CHOICES, "ratio": 0.5}, "quantization": {"grid": "int8"}}, "remove these"),
        ({"budget": {"choices": ["int8", "int4-32"], "ratio": 0.5}, "recovery": {}}, "remove recovery"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Variant.model_validate({"description": "d", **changes})


def test_a_budget_survives_json_and_is_told_in_short() -> None:
    plan = recipe(bits_per_weight=4.5, embeddings="int8")
    assert Recipe.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.told()["budget"] == {"bits_per_weight": 4.5, "choices": CHOICES}
    assert (plan.needs_text, plan.needs_gram, plan.selects, plan.changes_weights) == (True, True, True, True)
    assert plan.embeddings == "int8"
    with pytest.raises(HwpqError, match="no choice 'int7'"):
        plan.with_choices({"layer": "int7"})


# --- a variant


@pytest.mark.parametrize("kind", ["size_bytes", "ratio", "bits_per_weight"])
def test_the_export_fits_and_larger_limits_lose_less(root: Path, tmp_path: Path, kind: str) -> None:
    dense = Checkpoint(root / "model").size_bytes
    others = dense - 2 * sum(rows * columns for rows, columns in (layer.shape for layer in layer_map(root / "model")))
    losses = []
    for share in (0.38, 0.6):  # of the layers' bytes
        size = int(others + share * (dense - others)) + 30_000  # headers, which are a fourth of so small a file
        limit = {"size_bytes": size, "ratio": size / dense, "bits_per_weight": 16 * share}[kind]
        made(root, recipe(**{kind: limit}), tmp_path / f"made-{share}")
        held = CompressedModel(tmp_path / f"made-{share}")
        export = Checkpoint(export_checkpoint(root / "model", held.path, tmp_path / f"export-{share}"))
        if kind == "bits_per_weight":
            parts = [name for name in export.names if ".layers." in name and "norm" not in name]
            found = sum(export.tensor(name).nbytes for name in parts if not name.endswith("weight_shape"))
            assert 0.8 * share < found / (dense - others) <= share * 1.001
        else:
            assert 0.8 * size < export.size_bytes <= size
        losses.append(sum(len(one["match"]) * (one["quantization"] is None) for one in held.recipe["overrides"]))
    assert losses[0] <= losses[1]


def test_layers_with_one_input_share_a_choice_and_overrides_count_more(root: Path) -> None:
    groups = open_groups(root / "model", root / "statistics")
    entry = {
        "description": "d",
        "budget": {"choices": ["int8", "int4-32", "int3-32"], "bits_per_weight": 5},
        "ignore": ["re:.*layers.0.mlp.*"],
        "layers": [{"match": ["re:.*k_proj"], "quantization": {"grid": "fp8_e4m3"}}],
    }
    plan = Recipe.from_variant(Variant.model_validate(entry).model_dump())
    chosen = choose_layers(groups, plan, TOKENS, where="v")
    fixed = [layer.name for layer in groups.layers if "layers.0.mlp" in layer.name or "k_proj" in layer.name]
    assert chosen.keys() == set(groups.layers.names) - set(fixed)
    for block in range(2):
        first = f"model.layers.{block}.self_attn"
        assert chosen[f"{first}.q_proj"] == chosen[f"{first}.v_proj"]
    settled = plan.with_choices(chosen)
    for name in fixed:
        part = settled.for_layer(name).quantization
        assert part is None if "mlp" in name else (part is not None and part.grid == "fp8_e4m3")
    for name, word in chosen.items():
        part = settled.for_layer(name).quantization
        assert part is not None
        assert word.startswith(part.grid)


def test_what_a_token_reads_counts_two_of_four_as_packed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = open_groups(root / "model", root / "statistics")
    words = ["dense", "2of4"]
    plan = Recipe.from_variant(
        {"budget": {"choices": words, "decode_speed_ratio": 1.3}, "recovery": {"preset": "fast"}}
    )
    with caplog.at_level("INFO"):
        chosen = choose_layers(groups, plan, TOKENS, where="v")
    assert set(chosen.values()) == set(words)
    assert "gap to the best sharing 0" in caplog.text
    layers = {layer.name: layer.shape for layer in groups.layers}
    (table,) = groups.layers.tables
    head = 2 * table.shape[0] * table.shape[1]
    read = sum(
        rows * columns * (2 if chosen[name] == "dense" else 1) + (0 if chosen[name] == "dense" else rows * columns // 8)
        for name, (rows, columns) in layers.items()
    )
    whole = sum(2 * rows * columns for rows, columns in layers.values())
    assert (whole + head) / (read + head) >= 1.3


def test_no_pruning_is_told_where_rounding_costs_less(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = open_groups(root / "model", root / "statistics")
    with caplog.at_level("INFO"):
        chosen = choose_layers(groups, recipe(bits_per_weight=6), TOKENS, where="v")
    assert not any(word.startswith("2of4") for word in chosen.values())
    assert "no layer is pruned" in caplog.text


def test_a_choice_that_does_not_fit_a_layer_is_none_for_it(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=96, intermediate_size=128, num_attention_heads=6, num_key_value_heads=2)
    tiny_checkpoint(tmp_path / "model", config, dtype=torch.bfloat16)
    collect_statistics(tmp_path / "model", TOKENS, target=tmp_path / "statistics", dtype="float32")
    groups = open_groups(tmp_path / "model", tmp_path / "statistics")
    plan = Recipe.from_variant({"budget": {"choices": ["int8", "int4-128"], "bits_per_weight": 7.6}})
    assert misfits(plan, groups.layers, "v") == []
    chosen = choose_layers(groups, plan, TOKENS, where="v")
    small = {name for name, word in chosen.items() if word == "int4-128"}
    assert small
    assert all("down_proj" in name for name in small)  # the others have 96 columns
    assert plan.budget
    alone = replace(plan, budget=replace(plan.budget, choices=plan.budget.choices[1:]))
    (told, *_) = misfits(alone, groups.layers, "v")
    assert "96 columns do not divide into groups of 128" in str(told)


def test_layers_that_an_override_decides_on_are_no_part_of_the_budget(root: Path) -> None:
    """Even where the override equals one of the choices, which makes its layer a member of its siblings' group."""
    groups = open_groups(root / "model", root / "statistics")
    for own in ("q_proj", "k_proj"):
        entry = {
            "budget": {"choices": ["int8", "int4-32"], "bits_per_weight": 7},
            "layers": [{"match": [f"re:.*{own}"], "quantization": {"grid": "int8"}}],
        }
        plan = Recipe.from_variant(entry)
        chosen = choose_layers(groups, plan, TOKENS, where="v")
        assert set(chosen) == {name for name in groups.layers.names if own not in name}
        made = plan.with_choices(chosen)
        assert all(made.for_layer(name).quantization is not None for name in groups.layers.names)
        sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in groups.layers if layer.name in chosen}
        bits = {"int8": 8 + 16 / 64, "int4-32": 4.5}  # a scale a row of 64 and more columns
        assert sum(bits[word] * sizes[name] for name, word in chosen.items()) <= 7.02 * sum(sizes.values())


@pytest.mark.parametrize(
    ("limit", "kind"),
    [(1, "size_bytes"), (0.01, "ratio"), (1, "bits_per_weight"), (16, "decode_speed_ratio")],
)
def test_a_limit_out_of_reach_is_told_from_shapes_and_the_bound_itself_is_not(
    root: Path, limit: float, kind: str
) -> None:
    plan, shapes = recipe(**{kind: limit}), read_shapes(root / "model")
    told = str(out_of_reach(shapes, plan, "variants.v"))
    assert f"variants.v: budget.{kind}: {limit:g} cannot be reached: with the smallest choices it is" in told
    bound = tightest(shapes, plan)
    assert bound is not None
    assert plan.budget is not None
    assert out_of_reach(shapes, replace(plan, budget=replace(plan.budget, limit=bound)), "v") is None


def test_what_is_planned_for_lies_between_the_smallest_and_the_largest_choices(root: Path) -> None:
    shapes = read_shapes(root / "model")
    small, large = (
        export_bytes(shapes, Recipe.from_variant({"quantization": {"grid": grid, "group_size": size}}))
        for grid, size in (("int4", 64), ("int8", None))
    )
    entry = {"choices": ["int8", "int4-64"]}
    for limit in (1, 10**12):
        planned = export_bytes(shapes, Recipe.from_variant({"budget": {**entry, "size_bytes": limit}}))
        assert planned == (small if limit == 1 else large)


def test_a_model_in_32_bits_is_planned_in_32_bits(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", tiny_config(hidden_size=64, intermediate_size=128), dtype=torch.float32)
    shapes = read_shapes(tmp_path / "model")
    assert export_bytes(shapes, Recipe()) == 4 * shapes.parameters
    for kind, limit in (("decode_speed_ratio", 2.5), ("ratio", 0.45)):
        entry = {"budget": {"choices": ["dense", "int8"], "embeddings": "int8", kind: limit}}
        assert out_of_reach(shapes, Recipe.from_variant(entry), "v") is None


def test_codes_that_the_export_cannot_hold_beside_others_are_refused(root: Path) -> None:
    layers = open_groups(root / "model", root / "statistics").layers
    mixed = Recipe.from_variant({"budget": {"choices": ["mxfp4-32", "int8"], "ratio": 0.66}})
    assert "unpacks grid mxfp4 when it loads, and no further grid beside it" in str(misfits(mixed, layers, "v")[0])
    alone = Recipe.from_variant({"budget": {"choices": ["mxfp4-32", "dense"], "ratio": 0.66}})
    assert misfits(alone, layers, "v") == []


def test_a_budget_that_decides_on_nothing_and_healing_of_nothing_are_told(root: Path) -> None:
    layers = open_groups(root / "model", root / "statistics").layers
    for entry, words in (
        ({"budget": {"choices": ["int8", "dense"], "ratio": 0.9}, "ignore": ["Linear"]}, "it decides on no layer"),
        ({"quantization": {"grid": "int8"}, "ignore": ["Linear"], "healing": {}}, "there is nothing to heal"),
    ):
        assert [words in str(error) for error in misfits(Recipe.from_variant(entry), layers, "v")] == [True]


def test_more_samples_than_there_are_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = open_groups(root / "model", root / "statistics")
    choose_layers(groups, recipe(bits_per_weight=6), TOKENS[:3], where="v")
    assert "v: budget.samples is 8, and there are 3 calibration samples." in caplog.text
