"""The packed 2:4 export of the real model: its bytes, and what the runtime computes with it."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.runtime import load_packed
from tests.engines.conftest import MODEL, NEW_TOKENS, greedy, load, missed

WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
ROWS = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)
#: By variant: bytes of values and positions for a weight of the dense layer, and the number of scales.
ARITHMETIC = {
    "2of4": (2 * 9 / 16, 0), "2of4-int8-plain": (5 / 8, ROWS), "2of4-fp8": (5 / 8, ROWS),
    "2of4-int4": (3 / 8, WEIGHTS // 64),
}  # fmt: skip


@pytest.mark.parametrize("variant", ARITHMETIC)
def test_size_and_logits(variant, tmp_path, variants, prompts, samples):
    made = variants(variant)
    packed = export_semi_structured(MODEL, made.compressed, tmp_path / "packed")
    weight_bytes, scales = ARITHMETIC[variant]
    expected = WEIGHTS * weight_bytes + 2 * scales + 2 * (49152 * 576 + 61 * 576)  # and embeddings and norms
    size = (packed / "packed.safetensors").stat().st_size
    print(f"packed bytes {variant}: {size}, {size / expected - 1:+.3%} of the arithmetic")  # noqa: T201
    assert size == pytest.approx(expected, rel=0.005)
    model, theirs = load(made.export, rounding=False), load_packed(packed)
    with torch.inference_mode():
        for ids in (samples[:1, :300], samples[:1, :100], samples[:1, :1]):  # unpacked for a long prompt; the kernel
            torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=2e-3)
    for prompt, chosen in zip(prompts, greedy(theirs, prompts), strict=True):
        assert len(chosen) == NEW_TOKENS
        assert float(missed(model, prompt, chosen).max()) < 0.01
