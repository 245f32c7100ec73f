"""The GGUF file, read by the gguf package, against the codes and scales that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.gguf import export_gguf
from tests.export.making import layer_shapes, make_compressed
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}


def exported(tmp_path: Path, grid: str | None, group_size: int | None = None, **options: Any) -> Path:
    float16 = options.pop("float16", False)
    tiny_checkpoint(tmp_path / "model", options.pop("config", None), dtype=torch.bfloat16)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure, **options)
    return export_gguf(tmp_path / "model", tmp_path / "compressed", tmp_path / "gguf", float16=float16)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Fields, and by name each tensor's type and its values, rows first."""
    from gguf import GGUFReader, dequantize

    (file,) = directory.glob("*.gguf")
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def place(layer: str) -> tuple[str, int | None]:
    """A layer's name in GGUF and its number of heads, if its rows are moved."""
    block, _, kind = layer.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[kind]}.weight", HEADS.get(NAMES[kind])


def in_llama_order(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """Row j and row j + half of a head next to each other, one row at a time."""
    if heads is None:
        return weight
    moved, size = np.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            moved[head * size + 2 * j] = weight[head * size + j]
            moved[head * size + 2 * j + 1] = weight[head * size + size // 2 + j]
    return moved


@pytest.mark.parametrize(
    ("grid", "group_size", "kind"),
    [("int4", 32, "Q4_0"), ("int4", None, "Q4_0"), ("int8", None, "Q8_0"), ("mxfp4", 32, "MXFP4")],
)
def test_integer_codes_and_scales_are_kept(tmp_path: Path, grid: str, group_size: int | None, kind: str) -> None:
    directory = exported(tmp_path, grid, group_size, bfloat16_scales=True)
    weights = make_compressed(tmp_path / "again", grid, group_size=group_size, bfloat16_scales=True)
    _, tensors = read(directory)
    assert (directory / f"model-{kind}.gguf").is_file()
    for layer, weight in weights.items():
        name, heads = place(layer)
        assert tensors[name][0] == kind
        assert np.array_equal(tensors[name][1], in_llama_order(weight, heads).astype(np.float32)), layer


@pytest.mark.parametrize("grid", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_is_rounded_to_steps_of_a_block(tmp_path: Path, grid: str) -> None:
    _, tensors = read(exported(tmp_path, grid))
    for layer, weight in make_compressed(tmp_path / "again", grid).items():
        name, heads = place(layer)
        wanted, got = in_llama_order(weight, heads), tensors[name][1].astype(np.float64)
        assert tensors[name][0] == "Q8_0"
        blocks = np.abs(wanted).reshape(wanted.shape[0], -1, 32)
        step = np.repeat(blocks.max(2) / 127, 32, axis=1) * (1 + 2**-10)
        assert (np.abs(got - wanted) <= step / 2 + 127 * step * 2**-11).all(), layer
        assert (got[wanted == 0] == 0).all()


@pytest.mark.parametrize(("grid", "group_size"), [("fp8_e4m3", None), ("int8", None), ("int4", 16), (None, None)])
def test_float16_holds_every_variant(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    directory = exported(tmp_path, grid, group_size, float16=True)
    structure = "dense" if grid else "unstructured"
    _, tensors = read(directory)
    for layer, weight in make_compressed(tmp_path / "again", grid, group_size=group_size, structure=structure).items():
        name, heads = place(layer)
        wanted = in_llama_order(weight, heads)
        assert tensors[name][0] == "F16"
        np.testing.assert_allclose(tensors[name][1], wanted, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("tied", [True, False])
def test_everything_else_is_kept(tmp_path: Path, tied: bool) -> None:
    directory = exported(tmp_path, "int4", 32, config=tiny_config(tie_word_embeddings=tied))
    dense, (_, tensors) = load_file(tmp_path / "model" / "model.safetensors"), read(directory)
    assert ("output.weight" in tensors) is not tied
    for name, there in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        kind, values = tensors[there]
        assert kind == ("F32" if "norm" in there else "F16")
        np.testing.assert_allclose(values, dense[name].float().numpy(), rtol=0, atol=2**-25)
    assert len(tensors) == len(dense)
    assert len(layer_shapes()) == sum(kind == "Q4_0" for kind, _ in tensors.values())


def test_hyperparameters_tokenizer_and_template(tmp_path: Path) -> None:
    fields, _ = read(exported(tmp_path, "int8"))
    wanted = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8, "llama.context_length": 128, "llama.vocab_size": 260,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: fields[name] for name in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "message['content']" in fields["tokenizer.chat_template"]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "!"]
    assert len(tokens) == 260
    assert kinds[:4] == [3, 3, 3, 1]
    assert kinds[-1] == 5  # an id that the tokenizer does not have


def test_a_tokenizer_that_begins_with_bos_says_so(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", starts_with_bos=True)
    make_compressed(tmp_path / "compressed", "int8")
    fields, _ = read(export_gguf(tmp_path / "model", tmp_path / "compressed", tmp_path / "gguf"))
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_card_names_the_file_s_engines_and_bytes_repeat(tmp_path: Path) -> None:
    exported(tmp_path, "int4", 32)
    card = CardInfo("int4", "Four bits.", "tiny", "apache-2.0", "int4", "dense")
    first, second = (
        export_gguf(tmp_path / "model", tmp_path / "compressed", tmp_path / name, card=card) for name in ("a", "b")
    )
    text = (first / "README.md").read_text()
    assert "llama-cli" in text
    assert "ollama" in text
    assert sha256_directory(first) == sha256_directory(second)


def refused(tmp_path: Path, match: str) -> None:
    with pytest.raises(HwpqError, match=match):
        export_gguf(tmp_path / "model", tmp_path / "compressed", tmp_path / "gguf")
    assert not list(tmp_path.glob("gguf*"))


def test_groups_that_are_no_blocks_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_compressed(tmp_path / "compressed", "int4", group_size=16)
    refused(tmp_path, "groups of 16 are not whole blocks")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    settings = {key: getattr(tiny_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    tiny_checkpoint(tmp_path / "model", Qwen2Config(**settings, num_hidden_layers=2, num_attention_heads=4))
    make_compressed(tmp_path / "compressed", "int8")
    refused(tmp_path, "no GGUF for model type 'qwen2'")


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_compressed(tmp_path / "compressed", "int8")
    file = tiny_tokenizer(tmp_path / "model") / "tokenizer.json"
    file.write_text(file.read_text().replace('"use_regex": true', '"use_regex": false'))
    refused(tmp_path, "pre-tokenizer is none of smollm")


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_compressed(tmp_path / "compressed", "int8", shapes=layer_shapes(blocks=3))
    refused(tmp_path, r"model\.layers\.2")
