"""One loader for dense models and exports: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.decoder.loading import load_causal_lm, load_dense
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint

NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


def change(model: Path, **tensors: torch.Tensor | None) -> None:
    file = model / "model.safetensors"
    changed = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


def load(model: Path) -> object:
    return load_causal_lm(model, torch.float32, remedy="Make it again.")


def test_a_model_has_the_checkpoints_weights(model: Path) -> None:
    found = load_causal_lm(model, torch.bfloat16, remedy="Make it again.")
    assert not found.training
    assert torch.equal(found.model.norm.weight, load_file(model / "model.safetensors")[NORM].bfloat16())


@pytest.mark.parametrize("weight", [None, torch.ones(7)], ids=["missing", "another shape"])
def test_weights_that_do_not_fit_are_refused(model: Path, weight: torch.Tensor | None) -> None:
    change(model, model__norm__weight=weight)
    for loader in (load, lambda path: load_dense(path, torch.float32, torch.device("cpu"))):
        with pytest.raises(HwpqError, match=r"model\.norm\.weight|mismatch"):
            loader(model)


def test_further_tensors_may_be_there_but_no_codes_that_nothing_reads(model: Path) -> None:
    change(model, model__further_head=torch.ones(2))
    load(model)
    load_dense(model, torch.float32, torch.device("cpu"))
    change(model, model__stray__weight_packed=torch.ones(2))
    with pytest.raises(HwpqError, match=r"1 unexpected keys, first model\.stray\.weight_packed\. Make it again"):
        load(model)


def test_what_is_not_whole_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(HwpqError, match="no such checkpoint directory"):
        load(tmp_path / "none")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(HwpqError, match="corrupt safetensors file"):
        load(model)
