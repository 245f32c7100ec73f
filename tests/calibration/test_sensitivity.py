"""Gradients of outputs against the exact Fisher information, from Jacobians and all labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.calibration.sensitivity import output_gradients
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.decoder.loading import load_dense
from tests.architectures import save_checkpoint
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

NAMES = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


def exact(model: torch.nn.Module, name: str, ids: Tensor) -> Tensor:
    """(out,) mean over tokens of Σ_t Σ_y p_t(y) (∂ log p_t(y) / ∂output)², labels not drawn but summed over."""
    module = model.get_submodule(name)
    assert isinstance(module, torch.nn.Linear)
    held: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: output + held[0])
    held.append(torch.zeros(*ids.shape, module.out_features))
    total = torch.zeros(module.out_features, dtype=torch.float64)

    def logits(shift: Tensor) -> Tensor:
        held[0] = shift
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return found

    jacobian = torch.autograd.functional.jacobian(logits, held[0].clone())[:, :, 0]  # (t, y, t', out)
    with torch.no_grad():
        p = logits(torch.zeros_like(held[0])).softmax(-1)
    for t in range(ids.shape[1]):
        centred = jacobian[t] - torch.einsum("y,ysr->sr", p[t], jacobian[t])  # of log p_t(y)
        total += torch.einsum("y,ysr->r", p[t], centred.square()).double()
    hook.remove()
    return total / ids.numel()


def test_squared_gradients_are_the_fisher_information_of_the_outputs(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", tiny_config(vocab_size=64))
    ids = tiny_tokens(1, 12) % 64
    model = load_dense(path, torch.float32, torch.device("cpu"))
    found = dict(output_gradients(path, ids.repeat(1500, 1)))  # the same tokens with many labels
    assert list(found) == [1, 0]
    for name in NAMES:
        ((_, gradients),) = found[int(name.split(".")[2])][name]
        mine, wanted = gradients.double().square().mean(0), exact(model, name, ids)
        assert float(mine.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
        assert float((mine - wanted).norm() / wanted.norm()) < 0.15


def test_inputs_are_those_of_the_layer_and_gradients_those_of_the_whole_model(tmp_path: Path) -> None:
    """Walking back block by block gives what one backward pass through all of the model gives."""
    path, ids = tiny_checkpoint(tmp_path / "model"), tiny_tokens(3, 16)
    found = dict(output_gradients(path, ids, seed=3))
    model = load_dense(path, torch.float32, torch.device("cpu"))
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: torch.nn.Module) -> None:
        def forward(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            held[name] = (inputs[0], output)

        module.register_forward_hook(forward)

    for name in NAMES:
        keep(name, model.get_submodule(name))
    logs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=torch.Generator().manual_seed(3))
    (-logs.gather(-1, drawn).sum()).backward()
    for name in NAMES:
        ((x, gradient),) = found[int(name.split(".")[2])][name]
        torch.testing.assert_close(x, held[name][0].detach().flatten(0, 1), rtol=1e-4, atol=1e-5)
        wanted = held[name][1].grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted.flatten(0, 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phimoe", "gpt_oss", "gemma2", "falcon", "gemma3_vision", "jamba"])
def test_every_kind_of_layer_is_reached(tmp_path: Path, name: str) -> None:
    save_checkpoint(name, tmp_path / "model")
    ids = tiny_tokens(4, 32)
    found = {layer: pairs for _, seen in output_gradients(tmp_path / "model", ids) for layer, pairs in seen.items()}
    for layer in layer_map(tmp_path / "model"):
        for x, gradient in found[layer.name]:
            assert (x.shape[1], gradient.shape[1]) == (layer.shape[1], layer.shape[0])
            assert len(x) == len(gradient)
        assert any(bool(gradient.any()) for _, gradient in found[layer.name])
