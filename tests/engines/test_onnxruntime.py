"""ONNX Runtime runs the real model's exports: the same logits, perplexity and greedy tokens as transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hwpq_pipeline.export.onnx import export_onnx
from hwpq_pipeline.runtime.onnx_session import Session
from tests.engines.conftest import MODEL, NEW_TOKENS, load, losses, missed

VARIANTS = ("dense", "fp8", "int8", "int4", "2of4-fp8", "2of4-int4")
SAMPLES = 2


def logits(session: Session, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.fresh().logits(ids.numpy()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_perplexity_and_tokens_are_those_of_transformers(
    variant, tmp_path, variants, prompts, samples, perplexity_of_weights
):
    directory = export_onnx(MODEL, variants(variant).compressed, tmp_path / "onnx")
    session, model = Session(directory), load(variants(variant).export, rounding=False)
    with torch.inference_mode():
        wanted = model(samples[:1, :64]).logits
    difference = (logits(session, samples[:1, :64]) - wanted).abs()
    ours, _ = perplexity_of_weights(variant, SAMPLES)
    total = sum(losses(logits(session, ids[None])[0], ids) for ids in samples[:SAMPLES])
    theirs = math.exp(total / (SAMPLES * (samples.shape[1] - 1)))
    print(  # noqa: T201
        f"onnx {variant}: logits within {float(difference.max()):.4f}, perplexity ours {ours:.4f}, theirs {theirs:.4f}"
    )
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert float(difference.max()) < 0.01
    for prompt in prompts:
        chosen = session.greedy(np.array([prompt]), NEW_TOKENS)[0].tolist()
        behind = missed(model, prompt, chosen)
        print(f"onnx {variant}: missed by {float(behind.max()):.4f}")  # noqa: T201
        assert float(behind.max()) < 0.01, (chosen, behind)
