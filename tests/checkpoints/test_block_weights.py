"""Block weights of the files against the parameters of the real model, counted module by module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hwpq_pipeline.checkpoints.block_weights import block_weights, out_of_reach, told_left_dense
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from tests.beyond_linear import cohere, gpt_neo, gpt_oss, mamba, qwen2_moe
from tests.tiny import tiny_config, tiny_model

CONFIGS = {"llama": tiny_config, "gpt_oss": gpt_oss, "gpt_neo": gpt_neo, "qwen2_moe": qwen2_moe, "mamba": mamba,
           "cohere": cohere}  # fmt: skip


def counted(model: nn.Module) -> tuple[int, int]:
    """All block weights, and those of `nn.Linear` and of stacks of experts among them, module by module."""
    (blocks,) = [
        module for name, module in model.named_modules() if name in ("model.layers", "transformer.h", "backbone.layers")
    ]
    every = linear = 0
    for module in blocks.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or "bias" in name or "Norm" in type(module).__name__:
                continue
            every += parameter.numel()
            linear += parameter.numel() if isinstance(module, nn.Linear) or "Experts" in type(module).__name__ else 0
    return every, linear


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_hold_what_the_model_has(tmp_path: Path, name: str) -> None:
    model = tiny_model(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    found = block_weights(Checkpoint(tmp_path), layer_map(tmp_path))
    assert sum(torch.Size(shape).numel() for shape in found.values()) == counted(model)[0]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt_neo", "mamba"])
def test_what_is_out_of_reach_is_all_that_is_not_linear(tmp_path: Path, name: str) -> None:
    model = tiny_model(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    left = out_of_reach(Checkpoint(tmp_path), layer_map(tmp_path))
    every, linear = counted(model)
    assert sum(torch.Size(shape).numel() for shape in left.values()) == every - linear
    assert (left == {}) == (name in ("llama", "gpt_neo"))


def test_what_was_left_dense_is_told_by_kind(tmp_path: Path) -> None:
    tiny_model(gpt_oss()).save_pretrained(tmp_path)
    dense, layers = Checkpoint(tmp_path), layer_map(tmp_path)
    lines = told_left_dense(out_of_reach(dense, layers), block_weights(dense, layers), layers)
    # Two blocks: 4 experts of 64 × 256 and 128 × 64, a router of 4 × 64, attention of 64 × (64 + 32 + 32 + 64).
    total = 4 * (64 * 256 + 128 * 64) + 4 * 64 + 64 * 192
    assert lines == [f"model.layers.*.mlp.router: router of experts, {4 * 64 / total:.1%} of the block weights"]


def test_a_recurrences_own_tensors_are_told_by_name(tmp_path: Path) -> None:
    tiny_model(mamba()).save_pretrained(tmp_path)
    dense, layers = Checkpoint(tmp_path), layer_map(tmp_path)
    lines = told_left_dense(out_of_reach(dense, layers), block_weights(dense, layers), layers)
    assert [line.split(",")[0] for line in lines] == [
        "backbone.layers.*.mixer.A_log: narrower than a group of columns",
        "backbone.layers.*.mixer.conv1d: 3-D tensor",
    ]


def test_a_base_model_and_further_layers(tmp_path: Path) -> None:
    """Files may lack the path's first part, and hold layers that the config does not count."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    every, _ = counted(model)
    tensors = {
        name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["layers.2.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    tensors["vision.layers.0.fc.weight"] = torch.zeros(32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = block_weights(Checkpoint(tmp_path), layer_map(tmp_path))
    assert sum(torch.Size(shape).numel() for shape in found.values()) == every
