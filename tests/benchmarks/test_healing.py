"""The bench of healing on a tiny model: what is judged is the compressed model whole, its norms too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.healing import judged
from benchmarks.judge import hidden_states, judge
from benchmarks.number_formats import loaded
from hwpq_pipeline.checkpoints.compressed_writer import CompressedWriter
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import compress_model
from tests.tiny import tiny_checkpoint, tiny_tokens

NORM = "model.layers.0.input_layernorm.weight"


def test_a_models_own_norms_and_layers_are_judged(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "01_raw" / "model")
    recipe = Recipe.from_variant({"quantization": {"grid": "int8"}})
    (tmp_path / "made").mkdir()
    writer = CompressedWriter(tmp_path / "made")
    groups, parts = open_groups(model_dir, None), Parts(tmp_path / "parts")
    compress_model(groups, {}, recipe, parts=parts)
    for name in groups.members():
        writer.take(parts, name)
    dense, ids = loaded(model_dir), tiny_tokens()
    head, hidden = dense.lm_head.weight.detach().clone(), hidden_states(dense, ids)
    writer.replace({NORM: dense.get_parameter(NORM).detach() * 2})
    writer.close("made", "dense", recipe.to_json())
    known = {"text": {"hidden": hidden, **judge(dense, ids, hidden, head)}, "head": head}

    found = judged(tmp_path / "made", tmp_path, {"text": ids}, known)["text"]

    dense.get_parameter(NORM).data.mul_(2)
    expected = judge(dense, ids, hidden, head)  # INT8 moves the tiny model's weights hardly at all
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-3)
    assert found["kl_divergence"] == pytest.approx(expected["kl_divergence"], rel=0.05)
    assert found["times_dense"] == pytest.approx(found["perplexity"] / known["text"]["perplexity"])
