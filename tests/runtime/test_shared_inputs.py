"""Layers that read one input: found by running the model, multiplied in one call, the same to the bit."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hwpq_pipeline.runtime import load_packed
from hwpq_pipeline.runtime.packed_linear import PackedLinear
from tests.kernels.packed import needs_compiler
from tests.runtime.packed import packed_export
from tests.tiny import tiny_tokens

TOKENS = tiny_tokens(2, 12)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_export(tmp_path_factory.mktemp("shared"))


def apart(model: Any) -> Any:
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.shared = None
    return model


@torch.inference_mode()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_compiler)])
def test_layers_of_one_input_are_one_product_with_the_same_result(export: Path, native: bool) -> None:
    model = load_packed(export, native=native)
    together: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear) and layer.shared is not None:
            together.setdefault(id(layer.shared[0]), []).append(name)
    assert sorted(together.values()) == [
        group
        for block in range(2)
        for group in (
            [f"model.layers.{block}.mlp.{name}_proj" for name in ("gate", "up")],
            [f"model.layers.{block}.self_attn.{name}_proj" for name in "qkv"],
        )
    ]
    found = logits(model)
    assert torch.equal(found, logits(copy.deepcopy(model)))
    assert torch.equal(found, logits(apart(model)))


def test_nothing_of_a_call_stays(export: Path) -> None:
    model = load_packed(export)
    logits(model)
    assert all(
        layer.shared[0].latest == (None, {})
        for layer in model.modules()
        if isinstance(layer, PackedLinear) and layer.shared is not None
    )


def test_a_layer_that_is_called_alone_or_by_several_threads_is_right(export: Path) -> None:
    model = load_packed(export)
    layer = model.model.layers[0].self_attn.k_proj
    x = torch.randn(3, layer.in_features)
    with torch.inference_mode():
        alone = layer(x)
        assert torch.equal(alone, layer(x))  # its part of the first product is gone
        layer.shared = None
        assert torch.equal(alone, layer(x))
    model = load_packed(export)
    batches = [tiny_tokens(1, 12, seed=seed) for seed in range(16)]
    expected = [logits(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(lambda batch: logits(model, batch), batches), expected))


def test_compiled_it_is_the_same(export: Path) -> None:
    model = load_packed(export)
    expected = logits(model)
    found = logits(torch.compile(model, backend="eager"))
    assert torch.allclose(found, expected, atol=1e-5)
