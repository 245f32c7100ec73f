"""The benchmarks' judge, held to the definitions in float64 and to the project's own evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.judge import broken_fours, hidden_states, judge, zeros_by_layer
from hwpq_pipeline.evaluation.quality import evaluate_export, make_reference
from tests.tiny import tiny_checkpoint, tiny_model, tiny_tokens


def changed(seed: int = 0) -> Any:
    """The tiny model with half of each linear layer's columns gone."""
    model = tiny_model(seed=seed)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data[:, ::2] = 0
    return model


def test_figures_are_the_definitions() -> None:
    dense, model, ids = tiny_model(), changed(), tiny_tokens()
    head = dense.lm_head.weight.detach().clone()
    found = judge(model, ids, hidden_states(dense, ids), head)
    with torch.no_grad():
        log_p, log_q = (m.double()(ids).logits[:, :-1].log_softmax(-1) for m in (dense, model))
    loss = -log_q.gather(-1, ids[:, 1:, None]).mean()
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found["kl_divergence"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


def test_agrees_with_the_evaluation_of_exports(tmp_path: Path) -> None:
    dense, ids = tiny_checkpoint(tmp_path / "dense"), tiny_tokens()
    model, original = changed(), tiny_model()
    export = tiny_checkpoint(tmp_path / "export")
    model.save_pretrained(export)
    theirs = evaluate_export(export, make_reference(dense, ids, tmp_path / "reference"))
    ours = judge(model, ids, hidden_states(original, ids), original.lm_head.weight.detach().clone())
    assert ours["perplexity"] == pytest.approx(theirs.perplexity, rel=1e-5)
    assert ours["kl_divergence"] == pytest.approx(theirs.kl_divergence, abs=1e-5)


def test_another_head_is_refused() -> None:
    dense, ids = tiny_model(), tiny_tokens()
    with pytest.raises(SystemExit, match="output head"):
        judge(tiny_model(seed=1), ids, hidden_states(dense, ids), dense.lm_head.weight.detach().clone())


def test_zeros_and_fours_are_counted() -> None:
    model = changed()
    assert set(zeros_by_layer(model).values()) == {0.5}
    assert broken_fours(model) == 0
    layer = model.model.layers[0].self_attn.q_proj.weight
    layer.data[0, :4] = 1
    assert broken_fours(model) == 1
