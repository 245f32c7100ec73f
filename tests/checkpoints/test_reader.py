from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints.layers import LayerMap, layer_map
from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.checkpoints.reader import Checkpoint, read_names, read_tensors
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.mark.parametrize("shards", ["1GB", "10KB"])
def test_reads_every_tensor_of_one_file_or_of_shards(tmp_path: Path, shards: str) -> None:
    path = tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16, max_shard_size=shards)
    files = sorted(path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "10KB")
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    checkpoint = Checkpoint(path)
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    assert checkpoint.dtype == "BF16"
    assert checkpoint.config["hidden_size"] == 32
    matrix = Matrix("model.layers.1.mlp.down_proj.weight")
    assert checkpoint.weight(matrix).dtype == torch.float32
    assert checkpoint.weight(matrix).shape == (32, 64)


def test_non_finite_weights_name_the_layer(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m")
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file)
    checkpoint = Checkpoint(path)
    checkpoint.weight(Matrix("model.layers.0.mlp.gate_proj.weight"))
    with pytest.raises(HwpqError, match=r"layers\.0\.mlp\.up_proj.*1 of 2048"):
        checkpoint.weight(Matrix("model.layers.0.mlp.up_proj.weight"))


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scramble(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 1000)


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def drop_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "corrupt"),
        (scramble, "corrupt"),
        (drop_weights, "safetensors"),
        (break_config, "not valid JSON"),
        (drop_config, "no such file"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, damage, message: str) -> None:
    path = tiny_checkpoint(tmp_path / "m")
    damage(path)
    with pytest.raises(HwpqError, match=message):
        Checkpoint(path)


def test_missing_shard_and_missing_tensor(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", max_shard_size="10KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(HwpqError, match="ghost"):
        Checkpoint(path)
    min(path.glob("model-*.safetensors")).unlink()
    with pytest.raises(HwpqError, match="no such file"):
        Checkpoint(path)
    with pytest.raises(HwpqError, match="no such checkpoint"):
        Checkpoint(tmp_path / "none")


def test_tensor_files(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, file, metadata={"k": "v"})
    assert set(read_tensors(file)) == {"a", "b"}
    assert set(read_tensors(file, ["b"])) == {"b"}
    assert sorted(read_names(file)) == ["a", "b"]
    with pytest.raises(HwpqError, match="no tensor c"):
        read_tensors(file, ["c"])


def test_layer_map_lists_linears_in_module_order(tmp_path: Path) -> None:
    tiny_config(num_hidden_layers=3).save_pretrained(tmp_path)
    found = layer_map(tmp_path)
    shapes = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }  # fmt: skip
    expected = [(f"model.layers.{block}.{name}", block, shape) for block in range(3) for name, shape in shapes.items()]
    assert [(layer.name, layer.block, layer.shape) for layer in found] == expected
    assert (found.blocks, found.blocks_name) == (3, "model.layers")
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [layer.name for layer in found.in_block(1)] == [name for name, block, _ in expected if block == 1]


def shapes(layers: LayerMap) -> list[tuple[str, int, tuple[int, int]]]:
    return [(layer.name, layer.block, layer.shape) for layer in layers]


def test_layer_map_of_other_architectures(tmp_path: Path) -> None:
    """OPT, GPT-NeoX and GPT-2 name their blocks otherwise; GPT-2 holds its weights transposed."""
    from transformers import GPT2Config, GPTNeoXConfig, OPTConfig

    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **small).save_pretrained(tmp_path / "opt")
    opt = layer_map(tmp_path / "opt")
    assert opt.blocks_name == "model.decoder.layers"
    assert ("model.decoder.layers.1.fc1", 1, (48, 32)) in shapes(opt)
    assert not any("embed" in name or "lm_head" in name for name in opt.names)
    GPTNeoXConfig(intermediate_size=48, **small).save_pretrained(tmp_path / "neox")
    neox = layer_map(tmp_path / "neox")
    assert (neox.blocks_name, neox.tied) == ("gpt_neox.layers", {})
    assert ("gpt_neox.layers.0.attention.query_key_value", 0, (96, 32)) in shapes(neox)
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64).save_pretrained(tmp_path / "gpt2")
    gpt2 = layer_map(tmp_path / "gpt2")
    assert ("transformer.h.1.attn.c_attn", 1, (96, 32)) in shapes(gpt2)
    assert all(layer.stored.transposed and not layer.packs for layer in gpt2)


def test_layer_map_refuses_what_is_no_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(HwpqError, match="not a causal LM"):
        layer_map(tmp_path)
