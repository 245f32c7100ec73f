"""The packed export: its bytes by arithmetic, and the model that the runtime makes of it against the dense layout's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.kernels import packed_linear
from hwpq_pipeline.runtime import PackedLinear, load_packed
from tests.export.making import make_two_of_four
from tests.kernels.packed import needs_compiler
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

CASES = [("fp8_e4m3", None), ("int8", None), ("int4", 32), (None, None)]
#: Bytes of a 2:4 layer's values and positions, a weight of the dense layer.
BYTES = {"fp8_e4m3": 5 / 8, "int8": 5 / 8, "int4": 3 / 8, None: 17 / 8}  # the last: float32, 2 · 4 and 1/2 for 4


def exported(tmp_path: Path, grid: str | None, group_size: int | None = None) -> tuple[Path, dict[str, torch.Tensor]]:
    tiny_checkpoint(tmp_path / "model")
    weights = make_two_of_four(tmp_path / "compressed", grid, group_size)
    return export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "packed"), weights


@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_the_runtime_computes_with_the_packed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str | None, group_size: int | None
) -> None:
    monkeypatch.setattr(packed_linear, "FEW", 4)
    directory, weights = exported(tmp_path, grid, group_size)
    model, dense, tokens = load_packed(directory), tiny_model(), tiny_tokens()
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(weight)
        assert isinstance(model.get_submodule(layer), PackedLinear)
    with torch.inference_mode():
        for part in (tokens, tokens[:1, :3], tokens[:1, :1]):  # a prompt, and few enough tokens for the kernel
            torch.testing.assert_close(model(part).logits, dense(part).logits, rtol=1e-4, atol=1e-4)
        generated = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, dense.generate(tokens[:1], max_new_tokens=5, do_sample=False))


@needs_compiler
@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_the_native_kernel_computes_nearly_the_same(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    """It rounds the inputs of integer weights to INT8."""
    directory, _ = exported(tmp_path, grid, group_size)
    tokens = tiny_tokens()
    with torch.inference_mode():
        wanted = load_packed(directory)(tokens).logits
        model = load_packed(directory, native=True)
        loose = grid in ("int8", "int4")
        close = (model(tokens).logits - wanted).abs().max() / wanted.abs().max()
        assert float(close) < 0.02
        assert loose == (float(close) > 1e-5)  # the other kernel's inputs are not rounded


@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_bytes_are_the_arithmetic(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    directory, weights = exported(tmp_path, grid, group_size)
    stored = load_file(directory / "packed.safetensors")
    for layer, weight in weights.items():
        parts = [stored[f"{layer}.weight_{part}"].nbytes for part in ("kept", "positions")]
        assert sum(parts) == weight.numel() * BYTES[grid]
        assert (f"{layer}.weight_scale" in stored) == (grid is not None)
    others = [name for name in load_file(tmp_path / "model" / "model.safetensors") if "_proj" not in name]
    assert others
    assert set(others) < set(stored)
    assert sum("_proj" in name for name in stored) == len(weights) * (2 if grid is None else 3)


def test_sixteen_bit_weights_take_nine_sixteenths(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    weights = make_two_of_four(tmp_path / "compressed", None, None)
    directory = export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "packed")
    stored = load_file(directory / "packed.safetensors")
    packed = sum(tensor.nbytes for name, tensor in stored.items() if "_proj" in name)
    assert packed == sum(2 * weight.numel() for weight in weights.values()) * 9 / 16
    layer = load_packed(directory).get_submodule("model.layers.1.mlp.down_proj")
    wanted = weights["model.layers.1.mlp.down_proj"].bfloat16().float()
    torch.testing.assert_close(layer(torch.eye(64)).T, wanted, rtol=1e-6, atol=1e-6)


def test_stock_transformers_finds_no_weights_rather_than_half_of_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory, _ = exported(tmp_path, "int8")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_card_and_tokenizer_are_there(tmp_path: Path) -> None:
    exported(tmp_path, "int8")
    card = CardInfo("v", "Packed.", "tiny", "apache-2.0", "int8", "2of4")
    directory = export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "again", card=card)
    assert "load_packed" in (directory / "README.md").read_text()
    assert (directory / "tokenizer.json").is_file()
    assert (directory / "generation_config.json").is_file()


def test_biases_and_an_untied_head_are_kept(tmp_path: Path) -> None:
    config = tiny_config(attention_bias=True, tie_word_embeddings=False)
    tiny_checkpoint(tmp_path / "model", config)
    weights = make_two_of_four(tmp_path / "compressed", "int8", None)
    model = load_packed(export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "packed"))
    dense = tiny_model(config)
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(weight)
    with torch.inference_mode():
        torch.testing.assert_close(model(tiny_tokens()).logits, dense(tiny_tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}), ("gptj", {"rotary_dim": 8})],
)
def test_buffers_that_no_file_holds_are_computed(tmp_path: Path, kind: str, changes: dict[str, int]) -> None:
    """Gemma scales its embeddings by a buffer, GPT-J's attention holds its rotary table beside its weights."""
    from transformers import AutoConfig

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 260}  # fmt: skip
    names = {**shape, "n_inner": 64} if kind == "gptj" else shape
    config = AutoConfig.for_model(kind, **names, **changes)
    tiny_checkpoint(tmp_path / "model", config)
    shapes = {layer.name: layer.shape for layer in layer_map(tmp_path / "model")}
    weights = make_two_of_four(tmp_path / "compressed", "int8", None, shapes=shapes)
    model = load_packed(export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "packed"))
    dense = tiny_model(config)
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(weight)
    with torch.inference_mode():
        torch.testing.assert_close(model(tiny_tokens()).logits, dense(tiny_tokens()).logits, rtol=1e-4, atol=1e-4)


def test_a_variant_that_is_not_two_of_four_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_two_of_four(tmp_path / "compressed", "int8", None)
    file = tmp_path / "compressed" / "recipe.json"
    file.write_text(file.read_text().replace('"2of4"', '"unstructured"'))
    with pytest.raises(HwpqError, match="holds structure 2of4, not unstructured"):
        export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


DAMAGE = {
    "a layer without positions": lambda tensors, name: tensors.pop(f"{name}.weight_positions"),
    "a layer without scales": lambda tensors, name: tensors.pop(f"{name}.weight_scale"),
    "positions that name a column twice": lambda tensors, name: tensors[f"{name}.weight_positions"].zero_(),
    "another shape": lambda tensors, name: tensors.update({f"{name}.weight_kept": torch.zeros(3, 4)}),
    "a tensor too many": lambda tensors, name: tensors.update({"stray": torch.zeros(1)}),
    "no norm": lambda tensors, name: tensors.pop("model.norm.weight"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, what: str) -> None:
    directory, weights = exported(tmp_path, "int8")
    tensors = load_file(directory / "packed.safetensors")
    DAMAGE[what](tensors, next(iter(weights)))
    save_file(tensors, directory / "packed.safetensors")
    with pytest.raises(HwpqError, match=r"[Ee]xport (the variant|it) again"):
        load_packed(directory)


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    directory, _ = exported(tmp_path, "int8")
    with pytest.raises(HwpqError, match="no CUDA device"):
        load_packed(directory, device="cuda")
