"""Every token through every expert: the sums, the output that stays, and the forms that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from hwpq_pipeline.calibration import experts
from hwpq_pipeline.calibration.experts import all_experts
from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_tokens

TOKENS = torch.as_tensor(tiny_tokens(3, 16))
EXPERTS = 4
NOTHING: Any = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, num_local_experts=EXPERTS, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("experts") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def collected(model: Path, target: Path, **options: Any) -> Statistics:
    collect_statistics(model, TOKENS, target=target, dtype="float32", batch=2, **options)
    return Statistics(target)


def inputs_of_experts(model: Path) -> list[tuple[torch.Tensor, Any]]:
    """The oracle: each block's expert module with all that it gets, in float64, from a plain forward pass."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    loaded.set_experts_implementation("eager")
    found: list[tuple[torch.Tensor, Any]] = []
    for block in loaded.model.layers:
        stack = block.mlp.experts
        stack.register_forward_pre_hook(lambda module, args: found.append((args[0], module)))
    with torch.no_grad():
        loaded(input_ids=TOKENS, use_cache=False)
    return found


def test_each_experts_sums_are_of_all_tokens(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tokens go through in slices that do not divide them."""
    monkeypatch.setattr(experts, "_SLICE", 7)
    found = collected(model, tmp_path / "all", every_expert=True)
    plan = layer_map(model)
    for block, (x, module) in enumerate(inputs_of_experts(model)):
        for layer in plan.in_block(block):
            if "experts" not in layer.name:
                continue
            expert = int(layer.name.split("experts.")[1].split(".")[0])
            read = x
            if layer.shape[1] == 48:  # w2 reads what the two others make
                gate, up = (x @ module.gate_up_proj.detach()[expert].T).chunk(2, dim=-1)
                read = module.act_fn(gate) * up
            expected = read.T @ read
            torch.testing.assert_close(found.gram(layer.name).double(), expected, rtol=1e-4, atol=1e-6)
            assert found.tokens_of(layer.name) == TOKENS.numel()


def test_what_the_blocks_give_is_as_routed(model: Path, tmp_path: Path) -> None:
    """The second block's attention reads the first one's output: it is the same with and without."""
    routed, every = collected(model, tmp_path / "routed"), collected(model, tmp_path / "all", every_expert=True)
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(routed.gram(name), every.gram(name))
    expert = next(layer.name for layer in layer_map(model) if "experts" in layer.name)
    assert routed.tokens_of(expert) < TOKENS.numel()


def test_a_model_without_experts_is_as_before(tmp_path: Path) -> None:
    from tests.tiny import tiny_checkpoint

    path = tiny_checkpoint(tmp_path / "model")
    collected(path, tmp_path / "one")
    collected(path, tmp_path / "two", every_expert=True)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_experts_of_another_form_are_refused_in_a_line() -> None:
    class Mixed(nn.Module):
        num_experts = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    block = nn.Sequential(Mixed())
    refused = pytest.raises(HwpqError, match=r"block 3: its experts .* Set calibration.all_experts to false")
    with refused, all_experts(block, NOTHING, "block 3"):
        pass


def test_the_forward_is_put_back(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    stack = loaded.model.layers[0].mlp.experts
    before = stack.forward
    with all_experts(loaded.model.layers[0], NOTHING, "block 0"):
        assert stack.forward != before
    assert stack.forward == before
    assert json.dumps(sorted(stack.__dict__)) == json.dumps(sorted(loaded.model.layers[1].mlp.experts.__dict__))
