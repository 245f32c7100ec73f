"""The plan: its bytes against files that the stages write, its memory against what the code holds, and its seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.evaluation.quality import make_reference
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.measuring import tree_bytes
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sequential import ALL_AT_ONCE
from hwpq_pipeline.parameters import Compute
from hwpq_pipeline.pipelines.compress.nodes import compress_weights, settled_recipe
from hwpq_pipeline.pipelines.select.nodes import select_weights
from hwpq_pipeline.planning import Conditions, Need, Tokens, plan_stages
from hwpq_pipeline.planning.memory import Memory
from hwpq_pipeline.planning.rates import Line, Rates, measure_rates, part_of
from hwpq_pipeline.planning.shapes import Shapes, read_shapes
from hwpq_pipeline.variant import Variant
from tests.tiny import tiny_checkpoint, tiny_config

HIDDEN, WIDE, SAMPLES, LENGTH = 256, 512, 4, 64
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ewma50": {"selection": {"structure": "unstructured", "metric": "wanda", "sparsity": 0.5}},
    "int4": {"quantization": {"grid": "int4", "group_size": 64}},
    "2of4-fp8": {
        "selection": {"structure": "2of4", "metric": "hwpq_weighted"},
        "recovery": {"preset": "quality"},
        "quantization": {"grid": "fp8_e4m3"},
    },
}
RECIPES = {name: Recipe.from_variant({"description": "d", **entry}) for name, entry in VARIANTS.items()}
CONDITIONS = Conditions(Tokens(SAMPLES, LENGTH, 8), Tokens(SAMPLES, LENGTH, 1), formats=("semi-structured",))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = tiny_config(hidden_size=HIDDEN, intermediate_size=WIDE)
    return tiny_checkpoint(tmp_path_factory.mktemp("plan") / "model", config)


@pytest.fixture(scope="module")
def shapes(model) -> Shapes:
    return read_shapes(model)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 259, (SAMPLES, LENGTH))


@pytest.fixture(scope="module")
def statistics(model, tokens) -> Path:
    return collect_statistics(model, tokens, target=model.parent / "statistics", dtype="float32")


def needs(shapes: Shapes, conditions: Conditions = CONDITIONS, **options) -> dict[tuple[str | None, str], Need]:
    found = plan_stages(shapes, RECIPES, conditions, floor=0, **options)
    return {(need.variant, need.stage): need for need in found}


def test_the_shared_stages_leave_the_planned_bytes(model, shapes, statistics, tokens):
    planned = needs(shapes)
    assert planned[None, "fetch"].disk == pytest.approx(tree_bytes(model), rel=0.02)
    assert planned[None, "calibrate"].disk == pytest.approx(tree_bytes(statistics), rel=0.02)
    make_reference(model, tokens, model.parent / "reference")
    assert planned[None, "reference"].disk == pytest.approx(tree_bytes(model.parent / "reference"), rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variants_stages_leave_the_planned_bytes(model, shapes, statistics, tokens, tmp_path, name):
    planned, compute = needs(shapes), Compute(device="cpu")
    variant = Variant.model_validate({"description": "d", **VARIANTS[name]})
    samples = pd.DataFrame({"tokens": list(tokens)})
    choices, masks, _, _ = select_weights(model, statistics, samples, name, variant, compute, tmp_path)
    recipe = settled_recipe(variant, choices)
    made, _, _ = compress_weights(model, statistics, samples, masks, name, recipe, compute, tmp_path)
    exported = export_checkpoint(model, made, tmp_path / "export")
    for stage, folder in {"select": masks, "compress": made, "export": exported}.items():
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        others = shapes.side_bytes if stage == "export" else 0
        assert planned[name, stage].disk - others == pytest.approx(written, rel=0.1, abs=500)
    assert ((name, "formats") in planned) == (name == "2of4-fp8")
    if name == "2of4-fp8":
        packed = export_semi_structured(model, made, tmp_path / "packed")
        assert planned[name, "formats"].disk == pytest.approx(tree_bytes(packed), rel=0.1)


def test_what_changes_nothing_takes_nothing(shapes):
    planned = needs(shapes)
    for stage in ("select", "compress"):
        dense = planned["dense", stage]
        assert (dense.memory, dense.disk, dense.read) == (0, 0, 0)


def test_the_largest_block_counts_and_not_the_model(shapes):
    """Twice the blocks take no more memory in any stage that works a block at a time, and twice the disk."""
    again = tuple(replace(layer, block=layer.block + 2) for layer in shapes.layers)
    deep = replace(shapes, layers=(*shapes.layers, *again))
    one, two = needs(shapes), needs(deep)
    assert deep.block == shapes.block
    for key in ((None, "calibrate"), (None, "reference"), ("int4", "compress"), ("2of4-fp8", "compress")):
        assert two[key].memory == one[key].memory
    assert two["int4", "compress"].disk == 2 * one["int4", "compress"].disk
    assert two["2of4-fp8", "formats"].memory > one["2of4-fp8", "formats"].memory  # compared with the whole model


def test_healing_and_prompts_hold_the_whole_model(shapes):
    whole = 4 * shapes.parameters
    healed = Recipe.from_variant({"description": "d", **VARIANTS["2of4-fp8"], "healing": {}})
    asked = replace(CONDITIONS, prompts=True)
    found = {need.stage: need for need in plan_stages(shapes, {"healed": healed}, asked, floor=7)}
    assert found["compress"].memory > 7 + 2 * whole
    assert found["prompts"].memory == 7 + whole


def test_few_activations_are_held_at_once_and_many_in_chunks(shapes):
    recipe = RECIPES["2of4-fp8"]

    def planned(samples: int) -> int:
        return Memory(shapes, replace(CONDITIONS, calibration=Tokens(samples, LENGTH, 8))).compress(recipe)

    sample = Memory(shapes, CONDITIONS).sequence_sample()
    fit = ALL_AT_ONCE // sample
    assert planned(fit) > ALL_AT_ONCE
    assert planned(2 * fit) < ALL_AT_ONCE / 2
    assert planned(20 * fit) == pytest.approx(planned(2 * fit), rel=0.5)  # hidden states go to files


def test_a_gpu_holds_what_is_computed_there(shapes):
    planned = needs(shapes, replace(CONDITIONS, gpu=True))
    assert planned[None, "calibrate"].gpu == planned[None, "calibrate"].memory > 0
    assert planned[None, "reference"].gpu == planned["int4", "evaluate"].gpu == 0


def test_experts_have_sums_of_their_own():
    layers = layer_map_of_experts(experts=4)
    assert Shapes(layers, 0, 0).inputs == 2 * 32**2 + 4 * (32**2 + 16**2)


def layer_map_of_experts(experts: int):
    import json
    from tempfile import TemporaryDirectory

    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=experts, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()))
        return layer_map(folder).layers


def test_a_line_goes_through_two_widths():
    line = Line(2e-9, 1e-12)
    assert line.seconds((10, 1000)) == pytest.approx(10 * 1000 * 3e-9)


def test_seconds_come_from_rates_and_grow_with_the_work(model, shapes):
    rates = measure_rates(model, shapes, RECIPES.values(), item=4, device=torch.device("cpu"))
    assert min(rates.forward, rates.product, rates.logit, rates.read, rates.opening) > 0
    assert set(rates.steps) == {part_of(RECIPES[name].for_layer("x")) for name in VARIANTS if name != "dense"}
    planned = needs(shapes, rates=rates)
    assert planned["dense", "compress"].seconds == 0
    more = needs(shapes, replace(CONDITIONS, calibration=Tokens(100 * SAMPLES, LENGTH, 8)), rates=rates)
    for key in ((None, "calibrate"), ("2of4-fp8", "compress")):
        assert (more[key].seconds or 0) > (planned[key].seconds or 0) > 0
    assert more["int4", "compress"].seconds == planned["int4", "compress"].seconds  # no token runs there


def test_a_machine_of_known_speed_takes_known_seconds(shapes):
    """One operation a second: calibration takes the products of the layers and attention, and of the sums."""
    alone = Rates(1.0, 1.0, 1.0, 0.0, float("inf"), 0.0, {}, {})
    tokens = SAMPLES * LENGTH
    forward = 2 * tokens * (shapes.weights + 2 * LENGTH * HIDDEN * 2)
    sums = 1.5 * tokens * 2 * (3 * HIDDEN**2 + WIDE**2)
    assert needs(shapes, rates=alone)[None, "calibrate"].seconds == pytest.approx(forward + sums)
