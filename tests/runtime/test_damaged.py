"""Packed exports whose tensors are not those that they say: one line from the runtime, and for the plugin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.packed import read_form
from hwpq_pipeline.checkpoints.packed_checks import check_file
from hwpq_pipeline.checkpoints.packed_form import WEIGHTS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.runtime import load_packed
from tests.runtime.packed import TABLE, packed_export

LAYER = "model.layers.0.mlp.down_proj"  # (32, 64): two groups of scales
KEPT, POSITIONS, SCALE = (f"{LAYER}.weight_{part}" for part in ("kept", "positions", "scale"))
BIAS, NORM = "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"

Tensors = dict[str, Tensor]


def lost(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def become(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def instead(lost: str, found: str) -> Callable[[Tensors], Any]:
    """One tensor under another name, so that there are as many as before."""
    return lambda tensors: tensors.update({found: tensors.pop(lost)})


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return change


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no values": (lost(KEPT), f"no tensor {KEPT}"),
    "no positions": (lost(POSITIONS), f"no tensor {POSITIONS}"),
    "no scales": (lost(SCALE), f"no tensor {SCALE}"),
    "no codes of the embedding": (lost(f"{TABLE}.weight"), f"no tensor {TABLE}.weight"),
    "no scales of the embedding": (lost(f"{TABLE}.weight_scale"), f"no tensor {TABLE}.weight_scale"),
    "no norm": (lost(NORM), "tensors instead of"),
    "a stray scale": (lambda tensors: tensors.update({"foo.weight_scale": torch.ones(1)}), "many: foo.weight_scale"),
    "a tensor more": (lambda tensors: tensors.update({"stray": torch.ones(1)}), "tensors instead of"),
    "a bias under another name": (instead(BIAS, "stray"), "a tensor too many: stray"),
    "a bias in the place of another": (instead(BIAS, "lm_head.weight"), "lm_head.weight: shape"),
    "fewer values": (become(KEPT, lambda kept: kept[:, :-1]), f"{LAYER}: packed values of shape"),
    "fewer values and their positions": (
        lambda tensors: tensors.update(
            {KEPT: tensors[KEPT][:, :8].clone(), POSITIONS: tensors[POSITIONS][:, :4].clone(),
             SCALE: tensors[SCALE][:, :1].clone()}
        ),
        f"{LAYER}: packed values for (32, 32) do not fit a layer of (32, 64)",
    ),
    "values in one dimension": (become(KEPT, torch.flatten), f"{LAYER}: packed values of shape"),
    "values of 16 bits": (become(KEPT, to(torch.int16)), "weight_kept: int16 instead of uint8"),
    "fewer rows of positions": (become(POSITIONS, lambda found: found[:-1]), "weight_positions: shape"),
    "narrower positions": (become(POSITIONS, lambda found: found[:, :-1]), "weight_positions: shape"),
    "positions in one dimension": (become(POSITIONS, torch.flatten), "weight_positions: shape"),
    "positions of 16 bits": (become(POSITIONS, to(torch.int16)), "weight_positions: int16 instead of uint8"),
    "groups that do not divide": (become(SCALE, lambda scale: scale.repeat(1, 2)[:, :3]), "weight_scale: shape"),
    "scales of too few rows": (become(SCALE, lambda scale: scale[:-1]), "weight_scale: shape"),
    "scales in one dimension": (become(SCALE, torch.flatten), "weight_scale: shape"),
    "a scale that is no number": (become(SCALE, filled(float("nan"))), "values that are NaN or infinite"),
    "an infinite scale": (become(SCALE, filled(float("inf"))), "values that are NaN or infinite"),
    "scales of 64 bits": (become(SCALE, to(torch.float64)), "weight_scale: float64 instead of float32"),
    "an embedding that is too short": (
        lambda tensors: tensors.update({name: tensors[name][:-1].clone() for name in tensors if TABLE in name}),
        f"{TABLE}.weight: shape",
    ),
    "codes of 16 bits": (become(f"{TABLE}.weight", to(torch.int16)), "embed_tokens.weight: int16 instead of int8"),
    "one scale for all rows": (become(f"{TABLE}.weight_scale", lambda scale: scale[:1]), "weight_scale: shape"),
    "a norm that is too short": (become(NORM, lambda norm: norm[:-1]), f"{NORM}: shape (31,) instead of (32,)"),
    "a norm that is no number": (become(NORM, filled(float("nan"))), "values that are NaN or infinite"),
    "a norm of 64 bits": (become(NORM, to(torch.float64)), f"{NORM}: float64 instead of"),
    "a norm of truths": (become(NORM, to(torch.bool)), f"{NORM}: bool instead of"),
    "a bias of integers": (become(BIAS, to(torch.int16)), f"{BIAS}: int16 instead of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that is right."""
    return packed_export(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def export(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "export"))


def as_the_plugin(export: Path) -> None:
    """What vLLM's plugin asks of a folder."""
    check_file(export, read_form(export), partial(meta_model, export))


def refused(export: Path, said: str) -> None:
    """By both, in the same words."""
    for load in (load_packed, as_the_plugin):
        with pytest.raises(HwpqError) as caught:
            load(export)
        assert said in str(caught.value)
        assert "Export the variant again" in str(caught.value)


def test_what_is_right_is_taken(export: Path) -> None:
    load_packed(export)
    as_the_plugin(export)


@pytest.mark.parametrize("what", DAMAGE)
def test_tensors_that_are_not_those_of_the_model_are_refused(export: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    tensors = load_file(export / WEIGHTS)
    damage(tensors)
    save_file(tensors, export / WEIGHTS)
    refused(export, said)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a smaller vocabulary": (lambda config: config.update(vocab_size=259), f"{TABLE}.weight: shape (260, 32)"),
    "more blocks": (lambda config: config.update(num_hidden_layers=3), "no tensor model.layers.2."),
    "fewer blocks": (lambda config: config.update(num_hidden_layers=1), "model.layers.1.mlp.down_proj: the model has"),
    "wider layers": (lambda config: config.update(intermediate_size=96), "do not fit a layer of"),
    "biases that the file lacks": (lambda config: config.update(mlp_bias=True), "no tensor model.layers.0.mlp."),
    "no biases": (lambda config: config.update(attention_bias=False), "a tensor too many: model.layers.0.self_attn."),
    "a head of its own": (lambda config: config.update(tie_word_embeddings=False), "no tensor lm_head.weight"),
    "one layer of them": (
        lambda config: config["quantization_config"].update(layers=[LAYER]), "a tensor too many: model.layers.0.mlp."),
    "no layer": (lambda config: config["quantization_config"].update(layers=[]), "quantization_config.layers does not"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_of_another_model_is_refused(export: Path, what: str) -> None:
    change, said = CONFIGS[what]
    config = json.loads((export / "config.json").read_text())
    change(config)
    (export / "config.json").write_text(json.dumps(config))
    refused(export, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"device": "nope"}, "device 'nope': a packed model is not loaded there. Give cpu or cuda."),
        ({"device": "mps"}, "device 'mps': a packed model is not loaded there"),
        ({"device": "meta"}, "device 'meta': a packed model is not loaded there"),
        ({"device": None}, "device None: a packed model is not loaded there"),
        ({"device": "cuda:99"}, "there is no CUDA device"),
        ({"dtype": torch.int8}, "dtype torch.int8: a packed model does not compute in it. Give torch.float32 or"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16': a packed model does not compute in it"),
    ],
)
def test_wrong_arguments_end_in_one_line(whole: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(HwpqError) as caught:
        load_packed(whole, **arguments)
    assert said in str(caught.value)


def test_what_is_no_folder_of_an_export_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for wrong, said in (
        (whole / "config.json", "no such file"),
        (whole / "not there", "no such file"),
        (tmp_path, "no section quantization_config: this is no packed export"),
    ):
        with pytest.raises(HwpqError, match=said):
            load_packed(wrong)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(HwpqError, match="a folder, and no file"):
        load_packed(tmp_path)
