"""The export against the codes and scales it was given: stock transformers must compute with those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from tests.export.making import layer_shapes, make_compressed
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

CASES = [
    pytest.param("fp8_e4m3", None, id="fp8_e4m3"),
    pytest.param("fp8_e5m2", None, id="fp8_e5m2"),
    pytest.param("int8", None, id="int8"),
    pytest.param("int4", 16, id="int4"),
    pytest.param("int4", None, id="int4-channel"),
    pytest.param("int3", 16, id="int3"),
    pytest.param("int2", 16, id="int2"),
    pytest.param("nvfp4", 16, id="nvfp4"),
    pytest.param("mxfp4", 32, id="mxfp4"),
    pytest.param(None, None, id="pruned"),
]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def exported(tmp_path: Path, grid: str | None, group_size: int | None = None, **options: Any) -> Path:
    dtype = options.pop("dtype", torch.float32)
    tiny_checkpoint(tmp_path / "model", options.pop("config", None), dtype=dtype)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure, **options)
    return export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")


def load(directory: Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    model, found = loaded
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def switch_activation_rounding(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = on


@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_stock_transformers_computes_with_the_exported_weights(
    tmp_path: Path, grid: str | None, group_size: int | None
) -> None:
    directory = exported(tmp_path, grid, group_size)
    weights = make_compressed(tmp_path / "again", grid, group_size=group_size,
                              structure="dense" if grid else "unstructured")  # fmt: skip
    dense, model, tokens = load(tmp_path / "model"), load(directory), tiny_tokens()
    with torch.inference_mode():
        model(tokens[:1, :2])  # the first forward unpacks
        switch_activation_rounding(model, on=False)
        got = model(tokens).logits
        for layer, weight in weights.items():
            wanted = torch.from_numpy(weight).float()
            assert torch.equal(model.get_submodule(layer).weight, wanted), layer
            dense.get_submodule(layer).weight.data.copy_(wanted)
        torch.testing.assert_close(got, dense(tokens).logits, rtol=1e-5, atol=1e-5)


def e4m3_values() -> np.ndarray:
    """All finite E4M3 numbers from their bits: sign, 4 exponent bits (bias 7), 3 mantissa bits."""
    values = []
    for bits in range(256):
        sign, exponent, mantissa = -1 if bits & 128 else 1, bits >> 3 & 15, bits & 7
        if exponent == 15 and mantissa == 7:
            continue  # NaN
        magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(sign * magnitude)
    return np.unique(np.array(values))


def round_activations(x: np.ndarray, grid: str) -> np.ndarray:
    """A token's activations as the export's scheme rounds them, by search over the grid."""
    table = np.arange(-128, 128.0) if grid == "int8" else e4m3_values()
    scale = np.float32(np.abs(x).max()) / np.float32(127.5 if grid == "int8" else 448)
    scaled = (x / scale).astype(np.float64)
    nearest = table[np.abs(scaled[:, None] - table).argmin(1)]
    return nearest * np.float64(scale)


@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_activations_are_rounded_per_token(tmp_path: Path, grid: str) -> None:
    model = load(exported(tmp_path, grid))
    weight = make_compressed(tmp_path / "again", grid)[Q_PROJ]
    layer, generator = model.get_submodule(Q_PROJ), torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 32, generator=generator)
    with torch.inference_mode():
        model(tiny_tokens()[:1, :2])
        got = layer(x).double().numpy()
        switch_activation_rounding(model, on=False)
        plain = layer(x).double().numpy()
    wanted = np.array([[round_activations(token.numpy(), grid) @ weight.T for token in row] for row in x])
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(got - plain).max() > 1e-3 * np.abs(wanted).max()


def test_int4_and_unquantized_exports_round_no_activations(tmp_path: Path) -> None:
    for number, (grid, group_size) in enumerate([("int4", 16), (None, None)]):
        config = json.loads((exported(tmp_path / str(number), grid, group_size) / "config.json").read_text())
        written = config.get("quantization_config")
        assert written is None or written["config_groups"]["group_0"]["input_activations"] is None


@pytest.mark.parametrize(("grid", "group_size"), CASES[:-1])
def test_config_is_what_the_library_writes_for_this_model(tmp_path: Path, grid: str, group_size: int | None) -> None:
    from compressed_tensors.compressors import ModelCompressor

    directory = exported(tmp_path, grid, group_size)
    config = json.loads((directory / "config.json").read_text())
    written = config["quantization_config"]
    if written.pop("dequantize", False):
        (directory / "config.json").write_text(json.dumps(config))
    model = load(directory)
    theirs = ModelCompressor.from_pretrained_model(model).quantization_config.model_dump(mode="json")
    assert {key: written[key] for key in theirs} == theirs
    assert "sparsity_config" not in written
    assert written["ignore"] == ["lm_head"]
    assert written["quant_method"] == "compressed-tensors"


def test_packed_words_hold_eight_columns_lowest_bits_first(tmp_path: Path) -> None:
    directory = exported(tmp_path, "int4", 16)
    stored = load_file(directory / "model.safetensors")
    codes = load_file(tmp_path / "compressed" / "block_000.safetensors")[f"{Q_PROJ}.codes"].numpy()
    words = stored[f"{Q_PROJ}.weight_packed"].numpy().view(np.uint32)
    assert stored[f"{Q_PROJ}.weight_shape"].tolist() == [32, 32]
    for row in range(32):
        for column in range(32):
            nibble = int(words[row, column // 8]) >> (4 * (column % 8)) & 15
            assert nibble - 8 == codes[row, column]


@pytest.mark.parametrize("short", [True, False])
def test_scales_keep_their_values(tmp_path: Path, short: bool) -> None:
    directory = exported(tmp_path, "fp8_e4m3", dtype=torch.bfloat16, bfloat16_scales=short)
    scale = load_file(directory / "model.safetensors")[f"{Q_PROJ}.weight_scale"]
    given = load_file(tmp_path / "compressed" / "block_000.safetensors")[f"{Q_PROJ}.scale"]
    assert scale.dtype == (torch.bfloat16 if short else torch.float32)
    assert torch.equal(scale.float(), given)


@pytest.mark.parametrize("tied", [True, False])
def test_everything_else_is_copied_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    directory = exported(tmp_path, "int8", dtype=torch.bfloat16, config=config)
    dense = load_file(tmp_path / "model" / "model.safetensors")
    stored = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    others = [name for name in dense if name.removesuffix(".weight") not in layer_shapes()]
    assert others
    for name in others:
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], dense[name])
    load(directory)


def test_loads_without_any_argument_and_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = exported(tmp_path, "fp8_e4m3", dtype=torch.bfloat16)
    capfd.readouterr()
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        logits = model(**tokenizer("the river", return_tensors="pt")).logits
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())
    assert tokenizer.chat_template
    said = capfd.readouterr().err.lower()
    assert not [word for word in ("missing", "unexpected", "not initialized", "newly", "warn") if word in said]


def test_dense_variant_is_the_model_itself(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "model" / "source.json").write_text("{}")
    make_compressed(tmp_path / "compressed", None)
    directory = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    dense, stored = (load_file(path / "model.safetensors") for path in (tmp_path / "model", directory))
    assert dense.keys() == stored.keys()
    assert all(torch.equal(dense[name], stored[name]) for name in dense)
    files = {file.name for file in directory.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
    assert "source.json" not in files
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    whole = exported(tmp_path, "int4", 16)
    parts = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "parts", shard_bytes=10_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    expected, total = load_file(whole / "model.safetensors"), 0
    for name, file in index["weight_map"].items():
        with safe_open(parts / file, framework="pt") as stream:
            tensor = stream.get_tensor(name)
        assert torch.equal(tensor, expected.pop(name))
        total += tensor.nbytes
    assert not expected
    assert index["metadata"]["total_size"] == total
    load(parts)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = exported(tmp_path, "int4", 16)
    second = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "second")
    assert sha256_directory(first) == sha256_directory(second)


# Bad input: each changes one thing in a good intermediate (tensors of its first file, recipe).
BAD = {
    "a scale is missing": lambda tensors, recipe: tensors.pop(f"{Q_PROJ}.scale"),
    "a tensor too many": lambda tensors, recipe: tensors.update({"stray.codes": torch.zeros(1)}),
    "another shape": lambda tensors, recipe: tensors.update(
        {f"{Q_PROJ}.codes": torch.zeros(31, 32, dtype=torch.int8)}),
    "another dtype": lambda tensors, recipe: tensors.update({f"{Q_PROJ}.codes": torch.zeros(32, 32)}),
    "a scale that is NaN": lambda tensors, recipe: tensors[f"{Q_PROJ}.scale"].fill_(float("nan")),
    "a scale of zero": lambda tensors, recipe: tensors[f"{Q_PROJ}.scale"].fill_(0),
    "a code off the grid": lambda tensors, recipe: tensors[f"{Q_PROJ}.codes"].fill_(8),
    "other groups": lambda tensors, recipe: recipe.update(group_size=8),
    "an unknown grid": lambda tensors, recipe: recipe.update(grid="int5"),
    "no grid": lambda tensors, recipe: recipe.update(grid=None, group_size=None),
    "a recipe without layers": lambda tensors, recipe: recipe.pop("layers"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_intermediate_is_refused_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    before = sha256_directory(exported(tmp_path, "int4", 16))
    file, recipe_file = (
        tmp_path / "compressed" / "block_000.safetensors",
        tmp_path / "compressed" / "recipe.json",
    )
    tensors, recipe = load_file(file), json.loads(recipe_file.read_text())
    BAD[what](tensors, recipe)
    save_file(tensors, file)
    recipe_file.write_text(json.dumps(recipe))
    with pytest.raises(HwpqError):
        export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    assert sha256_directory(tmp_path / "export") == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "compressed", "export"}


def test_pruned_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    exported(tmp_path, None)
    file = tmp_path / "compressed" / "block_000.safetensors"
    tensors = load_file(file)
    tensors[f"{Q_PROJ}.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(HwpqError, match=r"q_proj: weights are NaN or infinite"):
        export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")


def test_corrupt_file_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, "int8")
    file = tmp_path / "compressed" / "block_001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HwpqError, match="corrupt"):
        export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_compressed(tmp_path / "compressed", "int8", shapes=layer_shapes(blocks=3))
    with pytest.raises(HwpqError, match=r"model\.layers\.2"):
        export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")


def test_a_quantized_model_is_not_a_dense_one(tmp_path: Path) -> None:
    directory = exported(tmp_path, "int8")
    with pytest.raises(HwpqError, match="quantized already"):
        export_checkpoint(directory, tmp_path / "compressed", tmp_path / "twice")
