"""Stock transformers computes with the weights that the compression chose, on the real model."""

from __future__ import annotations

import json

import pytest
import torch

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from tests.engines.conftest import DATA, MODEL, load, perplexity, switch_rounding

SHIPPED = ("fp8", "int4", "2of4-fp8", "2of4-int4", "ewma50-fp8", "paper-2of4-fp8")


@pytest.fixture(scope="module")
def dense():
    return load(MODEL)


@pytest.mark.parametrize("variant", [*SHIPPED, "int8", "2of4-int8-plain"])
def test_logits_are_those_of_codes_times_scales(variant, dense, prompts, variants):
    source, model = CompressedModel(variants(variant).compressed), load(variants(variant).export)
    ids = torch.tensor([prompts[3]])
    with torch.inference_mode():
        rounded = model(ids).logits
        switch_rounding(model, on=False)
        logits = model(ids).logits
        for layer in layer_map(MODEL):
            found = source.read_quantized(layer.name, layer.shape)
            scale = found.scale.repeat_interleave(layer.shape[1] // found.scale.shape[1], dim=1)
            dense.get_submodule(layer.name).weight.data.copy_(found.codes.float() * scale)
        wanted = dense(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(rounded, logits) == (source.grid == "int4")


@pytest.mark.parametrize("variant", ["fp8", "2of4-int4"])
def test_its_perplexity_is_the_evaluation_s(variant, variants, samples):
    written = json.loads((DATA / "08_reporting" / variant / "metrics.json").read_text())
    found = perplexity(load(variants(variant).export), samples)
    print(f"perplexity {variant}: {found:.6f} here, {written['perplexity']:.6f} in the report")  # noqa: T201
    assert samples.numel() - len(samples) == written["evaluation_predictions"]
    assert found == pytest.approx(written["perplexity"], rel=1e-3)


@pytest.mark.parametrize("variant", [*SHIPPED, "int8", "dense"])
def test_bytes_are_bits_times_weights_and_scales_and_embeddings(variant, variants):
    """The model's shapes written out: 30 blocks, hidden 576, feed-forward 1536, 9 and 3 heads of 64."""
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
    size = (variants(variant).export / "model.safetensors").stat().st_size
    print(f"bytes {variant}: {size}, {size / expected - 1:+.3%} of the arithmetic")  # noqa: T201
    assert size == pytest.approx(expected, rel=0.03)
