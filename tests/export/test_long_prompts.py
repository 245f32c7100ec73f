"""Rope scaling in every way that configs state it, and biases: each format against transformers at token 4,000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.gguf import export_gguf
from hwpq_pipeline.export.onnx import export_onnx
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.runtime import load_packed
from hwpq_pipeline.runtime.onnx_session import Session
from tests.export.llama_cpp import LlamaCpp
from tests.export.long_prompts import LENGTH, STATED, YARN, checkpoint
from tests.export.making import make_compressed, make_two_of_four
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKEN = 4000


def transformers_logits(model: Path, weights: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Of the dense model with these weights, (96, vocabulary), from token 4,000 on."""
    from transformers import AutoModelForCausalLM

    dense: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(torch.as_tensor(weight))
    with torch.inference_mode():
        logits: torch.Tensor = dense(ids, use_cache=False).logits[0, TOKEN:]
    return logits


def assert_agrees(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Every token's logits within a thousandth of their norm."""
    assert found.shape == wanted.shape
    assert float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 1e-3


@pytest.mark.parametrize("name", STATED)
def test_gguf_and_onnx_agree_with_transformers_at_token_4000(tmp_path: Path, name: str) -> None:
    model = checkpoint(tmp_path / "model", STATED[name], biased="biases" in name)
    weights = make_compressed(tmp_path / "compressed", "int4", group_size=32, bfloat16_scales=True)
    ids = tiny_tokens(1, LENGTH)
    wanted = transformers_logits(model, weights, ids)
    gguf = LlamaCpp(export_gguf(model, tmp_path / "compressed", tmp_path / "gguf"))
    assert_agrees(gguf.logits(ids[0])[TOKEN:], wanted)
    assert ("rope_freqs.weight" in gguf.tensors) == ("llama3" in name)
    assert gguf.fields.get("llama.rope.scaling.type") == ("linear" if "linear" in name else None)
    session = Session(export_onnx(model, tmp_path / "compressed", tmp_path / "onnx"))
    assert_agrees(torch.from_numpy(session.logits(ids.numpy()))[0, TOKEN:], wanted)


def test_the_scaling_is_seen_at_token_4000(tmp_path: Path) -> None:
    """Without it the logits are other ones, so that agreeing says something."""
    weights = make_compressed(tmp_path / "compressed", "int4", group_size=32, bfloat16_scales=True)
    ids = tiny_tokens(1, LENGTH)
    plain = transformers_logits(checkpoint(tmp_path / "plain", {}), weights, ids)
    for name in ("llama3", "linear"):
        scaled = transformers_logits(checkpoint(tmp_path / name, STATED[name]), weights, ids)
        assert float(((scaled - plain).norm(dim=1) / plain.norm(dim=1)).min()) > 0.05


def test_packed_takes_any_scaling(tmp_path: Path) -> None:
    model, ids = checkpoint(tmp_path / "model", YARN, biased=True), tiny_tokens(1, LENGTH)
    weights = make_two_of_four(tmp_path / "compressed", "int4", 32)
    packed = load_packed(export_semi_structured(model, tmp_path / "compressed", tmp_path / "packed"))
    with torch.inference_mode():
        found = packed(ids, use_cache=False).logits[0, TOKEN:]
    assert_agrees(found, transformers_logits(model, weights, ids))


def test_onnx_has_yarn_with_its_amplitude(tmp_path: Path) -> None:
    model, ids = checkpoint(tmp_path / "model", YARN), tiny_tokens(1, LENGTH)
    weights = make_compressed(tmp_path / "compressed", "int4", group_size=32)
    session = Session(export_onnx(model, tmp_path / "compressed", tmp_path / "onnx"))
    wanted = transformers_logits(model, weights, ids)
    assert_agrees(torch.from_numpy(session.logits(ids.numpy()))[0, TOKEN:], wanted)


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 1024}
REFUSED = [
    (export_gguf, YARN, "no GGUF for rope type 'yarn', only for 'default', 'linear', 'llama3'"),
    (export_gguf, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "no GGUF for rope type 'dynamic'"),
    (export_onnx, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "no ONNX graph for rope type 'dynamic'"),
    (export_gguf, {"rope_scaling": {"rope_type": "longrope", **FACTORS}}, "no GGUF for rope type 'longrope'"),
    (export_onnx, {"rope_scaling": {"rope_type": "longrope", **FACTORS}}, "no ONNX graph for rope type 'longrope'"),
]


@pytest.mark.parametrize(("export", "stated", "said"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(
    tmp_path: Path, export: Any, stated: dict[str, Any], said: str
) -> None:
    model = checkpoint(tmp_path / "model", stated)
    make_compressed(tmp_path / "compressed", "int8")
    with pytest.raises(HwpqError, match=said) as found:
        export(model, tmp_path / "compressed", tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_gguf, export_onnx])
@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "mistral"])
def test_scaled_and_capped_heads_and_sliding_windows_are_refused_by_name(
    tmp_path: Path, export: Any, kind: str
) -> None:
    from transformers import AutoConfig

    shape = {key: getattr(tiny_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    tiny_checkpoint(tmp_path / "model", AutoConfig.for_model(kind, **shape))
    make_compressed(tmp_path / "compressed", "int8")
    with pytest.raises(HwpqError, match=f"for model type '{kind}', only for 'llama'"):
        export(tmp_path / "model", tmp_path / "compressed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
