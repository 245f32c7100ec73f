"""A packed model is for inference: no gradients, no saving, nothing half-written; copies and pickles are whole."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.runtime import PackedLinear, load_packed
from tests.kernels.packed import needs_compiler
from tests.runtime.packed import packed_export
from tests.tiny import tiny_tokens


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with an embedding and a head in codes."""
    return packed_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(params=[False, pytest.param(True, marks=needs_compiler)], ids=["numba", "native"])
def model(request: pytest.FixtureRequest, export: Path) -> Any:
    """By each of the kernels; the native one has an embedding and a head of codes."""
    return load_packed(export, native=request.param)


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_nothing_wants_gradients(model: Any) -> None:
    assert not [name for name, part in model.named_parameters() if part.requires_grad]
    assert not model(tiny_tokens()).logits.requires_grad


def test_gradients_that_are_wanted_are_refused(model: Any) -> None:
    given = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(HwpqError, match="packed_linear: an input wants gradients, and this is for inference only"):
        model(inputs_embeds=given)
    with torch.no_grad():
        model(inputs_embeds=given)


def test_it_compiles_outside_of_no_grad(model: Any) -> None:
    """torch's kernel for INT8 weights has no derivative, so nothing may ask for one."""
    tokens = tiny_tokens()[:1, :4]
    got = torch.compile(model, backend="aot_eager")(tokens).logits
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_not_saved_and_nothing_is_left(model: Any, tmp_path: Path, compiled: bool) -> None:
    folder = tmp_path / "saved"
    given: Any = torch.compile(model, backend="aot_eager") if compiled else model
    ways: list[Callable[[], Any]] = [
        lambda: given.save_pretrained(folder),
        lambda: copy.deepcopy(given).save_pretrained(folder),
        lambda: given.push_to_hub("nobody/nothing"),
        given.state_dict,
        model.model.layers[0].state_dict,
        lambda: torch.save(model.state_dict(), tmp_path / "weights.pt"),
    ]
    for way in ways:
        with pytest.raises(HwpqError, match=r"a packed model is not saved\. Copy the export's folder"):
            way()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file])  # noqa: S301
def test_copies_and_pickles_are_whole(model: Any, way: Callable[[Any], Any], tmp_path: Path) -> None:
    again, tokens = way(model), tiny_tokens()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert isinstance(again.model.layers[0].mlp.up_proj, PackedLinear)
    with pytest.raises(HwpqError, match="is not saved"):
        again.save_pretrained(tmp_path / "saved")


@needs_compiler
def test_codes_are_not_resized_or_tied(export: Path) -> None:
    model: Any = load_packed(export, native=True)
    for name, arguments in (("resize_token_embeddings", [300]), ("tie_weights", [])):
        with pytest.raises(
            HwpqError, match=f"{name} needs weights, and the embedding or head of this model is in codes"
        ):
            getattr(model, name)(*arguments)
    assert load_packed(export).resize_token_embeddings(300).weight.shape == (300, 32)
