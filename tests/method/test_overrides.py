"""Other settings for some layers: the patterns, the recipe of a layer, exports that hold what each was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_name
from gguf import GGUFReader
from safetensors.torch import load_file

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.loading import open_model
from hwpq_pipeline.evaluation.size import measure_size
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.export.formats import further_formats
from hwpq_pipeline.method.fitting import misfits
from hwpq_pipeline.method.overrides import Override, check_patterns, matches
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.planning.shapes import read_shapes
from hwpq_pipeline.planning.sizes import export_bytes
from hwpq_pipeline.variant import Variant
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(8, 48)
Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
INT4 = {"grid": "int4", "group_size": 32, "method": "coordinate_descent"}
MIXED: dict[str, Any] = {
    "description": "d",
    "quantization": INT4,
    "selection": {"structure": "2of4"},
    "recovery": {"preset": "fast"},
    "layers": [
        {"match": ["re:.*k_proj"], "quantization": {"grid": "int8"}, "selection": None},
        {"match": ["re:.*layers.1.*"], "selection": None},
    ],
    "ignore": [DOWN],
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_variant(Variant.model_validate({**MIXED, **changes}).model_dump())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overrides")
    tiny_checkpoint(root / "model", tiny_config(hidden_size=64, intermediate_size=128))
    collect_statistics(root / "model", TOKENS, target=root / "statistics", dtype="float32")
    return root


def compressed(root: Path, made: Recipe, name: str) -> dict[str, torch.Tensor]:
    target = root / name
    if not target.exists():
        target.mkdir()
        write_model(root / "model", root / "statistics", made, target, name=name, tokens=TOKENS)
    return {key: value for file in target.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    "pattern", ["re:.*down_proj$", "re:model.layers.0", "re:layers", Q, "q_proj", "re:.*(q|k)_proj"]
)
def test_patterns_are_compressed_tensors_own(pattern: str) -> None:
    for layer in (Q, K, DOWN):
        assert matches(pattern, layer) == match_name(layer, pattern)


def test_the_last_match_counts_and_ignore_after_all() -> None:
    made = recipe()
    assert made.for_layer(Q) == Recipe.from_variant({**MIXED, "layers": [], "ignore": []})
    only = made.for_layer(K)
    assert only.quantization is not None
    assert (only.selection, only.recovery, only.quantization.grid) == (None, None, "int8")
    second = made.for_layer("model.layers.1.self_attn.k_proj")  # both match: the last one's sections, on the base
    assert second.quantization is not None
    assert (second.selection, second.quantization.grid) == (None, "int4")
    assert not made.for_layer(DOWN).changes_weights
    assert Recipe.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_without_overrides_the_record_is_as_it_was() -> None:
    plain = Recipe.from_variant({"quantization": INT4})
    assert set(plain.to_json()) == {"selection", "recovery", "quantization", "sequence"}


def test_each_layer_gets_what_it_would_get_alone(root: Path) -> None:
    """Rows are worked on alone given their inputs: a layer of a mixed variant is the one of the uniform variant."""
    mixed = compressed(root, recipe(), "mixed")
    four = compressed(root, recipe(layers=[], ignore=[]), "four")
    dense_four = compressed(root, recipe(layers=[], ignore=[], selection=None, recovery=None), "dense-four")
    eight = compressed(root, Recipe.from_variant({"quantization": {"grid": "int8"}}), "eight")
    for layer in layer_map(root / "model"):
        name = layer.name
        uniform = four
        if name == DOWN:
            assert not any(key.startswith(f"{name}.") for key in mixed)
            continue
        if ".layers.1." in name:
            uniform = dense_four
        elif name.endswith("k_proj"):
            uniform = eight
        for part in ("codes", "scale"):
            assert torch.equal(mixed[f"{name}.{part}"].float(), uniform[f"{name}.{part}"].float()), name


@pytest.mark.parametrize("preset", ["fast", "quality"])
def test_a_mixed_export_is_reloaded_as_it_is(root: Path, preset: str) -> None:
    made = recipe(recovery={"preset": preset})
    stored = compressed(root, made, f"mixed-{preset}")
    export = export_checkpoint(root / "model", root / f"mixed-{preset}", root / f"export-{preset}")
    config = json.loads((export / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    loaded = open_model(export, "float32", TOKENS)
    dense = load_file(root / "model" / "model.safetensors")
    for layer in layer_map(root / "model"):
        found = loaded.get_parameter(f"{layer.name}.weight")
        if layer.name == DOWN:
            assert torch.equal(found, dense[f"{layer.name}.weight"])
            continue
        codes, scale = stored[f"{layer.name}.codes"].float(), stored[f"{layer.name}.scale"].float()
        expected = (codes.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
        assert torch.allclose(found, expected, rtol=1e-6), layer.name
    size = measure_size(export, root / "model")
    assert size.expected_bytes == pytest.approx(size.size_bytes, rel=0.15)  # a tiny file's header is a large part
    (line,) = size.left_dense
    assert line.startswith("model.layers.*.mlp.down_proj: left as in the dense model")
    assert export_bytes(read_shapes(root / "model"), made) < export_bytes(
        read_shapes(root / "model"), recipe(ignore=["Linear"])
    )


def test_formats_hold_several_grids_or_refuse_them_by_name(root: Path) -> None:
    """What is written is run again and compared: an error would be told."""
    compressed(root, recipe(), "mixed")
    formats, made = further_formats(), CompressedModel(root / "mixed")
    for name in ("gguf", "onnx"):
        formats[name].write(root / "model", root / "mixed", root / name)
    (file,) = (root / "gguf").glob("*.gguf")
    assert {str(tensor.tensor_type.name) for tensor in GGUFReader(file).tensors} == {"Q4_0", "Q8_0", "F16", "F32"}
    assert "semi-structured holds" in str(formats["semi-structured"].refusal_of(made))
    compressed(root, recipe(layers=[{"match": ["re:.*k_proj"], "quantization": {**INT4, "grid": "int3"}}]), "three")
    assert "no place for grid int3" in str(formats["gguf"].refusal_of(CompressedModel(root / "three")))


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layers.0.mlp.down_prj", "model.layers.0.mlp.down_proj"),
        ("re:.*dwon_proj$", "mlp.down_proj"),
        ("zzz", "q_proj"),
    ],
)
def test_a_pattern_that_means_nothing_names_the_nearest(root: Path, pattern: str, nearest: str) -> None:
    with pytest.raises(HwpqError, match="matches no layer") as caught:
        check_patterns((Override((pattern,), {}),), layer_map(root / "model").names)
    assert nearest in str(caught.value)
    (told,) = misfits(recipe(ignore=[pattern]), layer_map(root / "model"), "variants.mine")
    assert str(told).startswith("variants.mine: ")


def test_shapes_that_do_not_fit_are_told_before_and_the_remedy_works(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", tiny_config(intermediate_size=98))
    layers = layer_map(tmp_path / "model")
    two, four = (
        misfits(recipe(layers=[], ignore=[]), layers, "variants.mine"),
        "98 columns do not divide into groups of",
    )
    assert [f"{four} 4" in str(error) for error in two] == [True]
    assert "`ignore` in the variant" in str(two[0])
    (rounding,) = misfits(Recipe.from_variant({"quantization": INT4}), layers, "v")
    assert f"{four} 32" in str(rounding)
    assert misfits(recipe(layers=[], ignore=["re:.*down_proj"]), layers, "variants.mine") == []
