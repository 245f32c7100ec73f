"""Stock transformers computes with the weights that the compression chose, on the real model."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.export.intermediate import Intermediate
from tests.engines.conftest import COMPRESSED, EXPORTS, MODEL, load

SHIPPED = ("fp8", "int4", "2of4-fp8", "2of4-int4", "ewma50-fp8", "paper-2of4-fp8")


@pytest.fixture(scope="module")
def dense():
    return load(MODEL)


def rounding(model, on):
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = on


@pytest.mark.parametrize("variant", [*SHIPPED, "int8"])
def test_logits_are_those_of_codes_times_scales(variant, dense, prompts, int8):
    compressed, export = int8 if variant == "int8" else (COMPRESSED / variant / "model", EXPORTS / variant)
    source, model, ids = Intermediate(compressed), load(export), torch.tensor([prompts[3]])
    with torch.inference_mode():
        rounded = model(ids).logits  # the first forward unpacks; activations are rounded where the scheme says so
        rounding(model, on=False)
        logits = model(ids).logits
        for layer in layer_map(MODEL):
            found = source.read_quantized(layer.name, layer.shape)
            scale = found.scale.repeat_interleave(layer.shape[1] // found.scale.shape[1], dim=1)
            dense.get_submodule(layer.name).weight.data.copy_(found.codes.float() * scale)
        wanted = dense(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(rounded, logits) == (source.grid == "int4")


@pytest.mark.parametrize("variant", [*SHIPPED, "int8", "dense"])
def test_bytes_are_bits_times_weights_and_scales_and_embeddings(variant, int8):
    """The model's shapes written out: 30 blocks, hidden 576, feed-forward 1536, 9 and 3 heads of 64."""
    export = int8[1] if variant == "int8" else EXPORTS / variant
    rows = {576: [(576, 2), (192, 2), (1536, 2)], 1536: [(576, 1)]}  # inputs: outputs, how many such layers a block
    weights = 30 * sum(columns * size * count for columns, made in rows.items() for size, count in made)
    outputs = 30 * sum(size * count for made in rows.values() for size, count in made)
    others = 2 * (49152 * 576 + 61 * 576)  # embeddings and norms, bfloat16
    if variant == "dense":
        expected = 2 * weights + others
    elif variant.endswith("int4"):
        expected = weights // 2 + 2 * weights // 64 + others
    else:
        expected = weights + 2 * outputs + others
    assert (export / "model.safetensors").stat().st_size == pytest.approx(expected, rel=0.03)
