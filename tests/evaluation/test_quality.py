"""Quality against its definition: whole distributions of both models, in float64, position by position."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation import loading, reference
from hwpq_pipeline.evaluation.quality import evaluate_export, load_reference, make_reference
from hwpq_pipeline.execution.engines import opened
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from tests.export.making import make_compressed
from tests.tiny import VOCABULARY, tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(samples=5, length=24)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def export(tmp_path: Path, grid: str | None, group_size: int | None = None, **options: Any) -> Path:
    if not (tmp_path / "model").exists():
        tiny_checkpoint(tmp_path / "model", **options)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure)
    return export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")


def distributions(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    """Log probabilities of the next tokens, (samples, length − 1, vocabulary), float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(tokens).logits.double().numpy()[:, :-1]
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def oracle(dense_dir: Path, export_dir: Path, tokens: torch.Tensor) -> dict[str, Any]:
    dense, variant = distributions(dense_dir, tokens), distributions(export_dir, tokens)
    nll, dense_nll, divergences, agreements = [], [], [], []
    for sample in range(tokens.shape[0]):
        for position in range(tokens.shape[1] - 1):
            p, q = dense[sample, position], variant[sample, position]
            truth = int(tokens[sample, position + 1])
            nll.append(-q[truth])
            dense_nll.append(-p[truth])
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            agreements.append(int(p.argmax()) == int(q.argmax()))
    return {
        "perplexity": math.exp(np.mean(nll)),
        "dense": math.exp(np.mean(dense_nll)),
        "kl": np.mean(divergences),
        "top1": np.mean(agreements),
        "nll": np.reshape(nll, (tokens.shape[0], -1)).mean(1),
    }


@pytest.mark.parametrize(("grid", "group_size"), [("fp8_e4m3", None), ("int8", None), ("int4", 16), (None, None)])
def test_quality_is_what_the_definitions_say(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    directory = export(tmp_path, grid, group_size, dtype=torch.bfloat16)
    make_reference(tmp_path / "model", TOKENS, tmp_path / "reference", batch=2)
    found = evaluate_export(directory, load_reference(tmp_path / "reference"), TOKENS, batch=2)
    wanted = oracle(tmp_path / "model", directory, TOKENS)
    assert wanted["kl"] > 0.01  # the two models differ, so that the figures say something
    assert found.perplexity == pytest.approx(wanted["perplexity"], rel=1e-5)
    assert found.dense_perplexity == pytest.approx(wanted["dense"], rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(wanted["perplexity"] / wanted["dense"], rel=1e-5)
    assert found.kl_divergence == pytest.approx(wanted["kl"], rel=1e-4, abs=1e-6)
    assert found.top1_agreement == pytest.approx(wanted["top1"])
    np.testing.assert_allclose(found.nll, wanted["nll"], rtol=1e-5)
    assert found.tokens == 5 * 23
    assert found.seconds > 0


def test_a_head_with_a_bias_counts(tmp_path: Path) -> None:
    from transformers import PhiConfig

    config = PhiConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, bos_token_id=1, eos_token_id=2)  # fmt: skip
    for number, name in enumerate(("model", "other")):
        tiny_checkpoint(tmp_path / name, config, seed=number)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        generator = torch.Generator().manual_seed(5)  # one head for both, random bias and all
        tensors["lm_head.bias"] = 2 * torch.randn(VOCABULARY, generator=generator)
        tensors["lm_head.weight"] = torch.randn(VOCABULARY, 32, generator=generator)
        save_file(tensors, file, {"format": "pt"})
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    found = evaluate_export(tmp_path / "other", answer)
    wanted = oracle(tmp_path / "model", tmp_path / "other", TOKENS)
    assert wanted["kl"] > 0.01
    assert found.kl_divergence == pytest.approx(wanted["kl"], rel=1e-4)
    assert found.perplexity == pytest.approx(wanted["perplexity"], rel=1e-5)


def test_the_dense_model_differs_from_itself_in_nothing(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference", batch=3)
    found = evaluate_export(tmp_path / "model", answer, TOKENS, batch=2)
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert found.kl_divergence < 1e-5
    assert found.top1_agreement == 1


def test_batches_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export(tmp_path, "fp8_e4m3")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    whole = evaluate_export(directory, answer, batch=5)
    monkeypatch.setattr(reference, "CHUNK", 7)
    again = make_reference(tmp_path / "model", TOKENS, tmp_path / "again", batch=3)
    parts = evaluate_export(directory, again, batch=2)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl_divergence == pytest.approx(whole.kl_divergence, rel=1e-4)
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-6)


def test_reference_is_read_back_and_made_alike(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    made = make_reference(tmp_path / "model", TOKENS.numpy(), tmp_path / "one")
    make_reference(tmp_path / "model", TOKENS, tmp_path / "two")
    read = load_reference(tmp_path / "one")
    for name in ("tokens", "expected", "constant", "top1", "nll"):
        assert torch.equal(getattr(made, name), getattr(read, name)), name
    assert (made.head_digest, made.dtype) == (read.head_digest, read.dtype) == (read.head_digest, "float32")
    assert sha256_directory(tmp_path / "one") == sha256_directory(tmp_path / "two")


def test_bfloat16_is_run_in_bfloat16(tmp_path: Path) -> None:
    directory = export(tmp_path, "int4", 16, dtype=torch.bfloat16)
    exact = make_reference(tmp_path / "model", TOKENS, tmp_path / "exact")
    coarse = make_reference(tmp_path / "model", TOKENS, tmp_path / "coarse", dtype="bfloat16")
    assert coarse.perplexity == pytest.approx(exact.perplexity, rel=0.05)
    assert coarse.perplexity != exact.perplexity
    with pytest.raises(HwpqError, match="bfloat16"):
        evaluate_export(directory, coarse)
    assert evaluate_export(directory, coarse, dtype="bfloat16").kl_divergence > 0


def test_progress_is_told_and_no_bar_is_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = export(tmp_path, "int8")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    capfd.readouterr()
    told: list[tuple[int, int]] = []
    evaluate_export(directory, answer, batch=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]  # decoder blocks
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_activation_rounding_that_is_not_in_force_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors.quantization.lifecycle import forward

    directory = export(tmp_path, "fp8_e4m3")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    monkeypatch.setattr(forward, "forward_quantize", lambda module, value, name, args: value)
    with pytest.raises(HwpqError, match="activations are not rounded"):
        evaluate_export(directory, answer)


def change(directory: Path, name: str, edit: Any) -> None:
    """Edit one tensor of a checkpoint in place; `edit` returning None drops it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    changed = edit(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, file, {"format": "pt"})


DAMAGE = {
    "a weight that is NaN": (f"{Q_PROJ}.weight_scale", lambda tensor: tensor.fill_(float("nan")), "NaN"),
    "a tensor lost": (f"{Q_PROJ}.weight_scale", lambda tensor: None, "missing keys"),
    "another shape": (f"{Q_PROJ}.weight", lambda tensor: tensor[:7].clone(), "shape|size|mismatch"),
    "another head": ("model.embed_tokens.weight", lambda tensor: tensor * 2, "lm_head is not the dense"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_exports_are_refused(tmp_path: Path, what: str) -> None:
    directory = export(tmp_path, "int8")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    name, edit, message = DAMAGE[what]
    change(directory, name, edit)
    with pytest.raises(HwpqError, match=message):
        evaluate_export(directory, answer)


def test_truncated_and_absent_exports_are_refused(tmp_path: Path) -> None:
    directory = export(tmp_path, "int8")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(HwpqError, match="corrupt safetensors file"):
        evaluate_export(directory, answer)
    with pytest.raises(HwpqError, match="nowhere: no such checkpoint directory"):
        evaluate_export(tmp_path / "nowhere", answer)


def capped() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=1,
                        eos_token_id=2, initializer_range=0.2, final_logit_softcapping=2.0)  # fmt: skip


def scaled() -> Any:
    from transformers import GraniteConfig

    return GraniteConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
                         initializer_range=0.2, logits_scaling=3.0)  # fmt: skip


@pytest.mark.parametrize(("config", "linear"), [(capped, False), (scaled, True)])
def test_capped_and_scaled_logits_are_judged_as_the_model_gives_them(tmp_path: Path, config: Any, linear: bool) -> None:
    from transformers import AutoModelForCausalLM

    tiny_checkpoint(tmp_path / "model", config())
    tiny_checkpoint(tmp_path / "other", config())
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    made = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    assert made.linear == load_reference(tmp_path / "reference").linear == linear
    found = evaluate_export(tmp_path / "other", made)
    logs = []
    for name in ("model", "other"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.inference_mode():
            logs.append(model(input_ids=made.tokens).logits[:, :-1].double().log_softmax(-1))
    p, q = logs
    labels = made.tokens[:, 1:, None]
    assert made.perplexity == pytest.approx(float(torch.exp(-p.gather(-1, labels).mean())), rel=1e-5)
    assert found.perplexity == pytest.approx(float(torch.exp(-q.gather(-1, labels).mean())), rel=1e-5)
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 1), dtype=np.int64), "predict nothing"),
        (np.zeros((2, 8)), "integers of shape"),
        (np.zeros(8, dtype=np.int64), "integers of shape"),
        (np.zeros((0, 8), dtype=np.int64), "integers of shape"),
        (np.full((1, 8), VOCABULARY), "vocabulary"),
        (np.full((1, 8), -1), "vocabulary"),
    ],
)
def test_bad_tokens_are_refused(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    tiny_checkpoint(tmp_path / "model")
    with pytest.raises(HwpqError, match=message):
        make_reference(tmp_path / "model", tokens, tmp_path / "reference")


def test_a_reference_of_other_tokens_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    with pytest.raises(HwpqError, match="not those of the reference"):
        evaluate_export(tmp_path / "model", answer, TOKENS[:3])
    save_file({"tokens": TOKENS}, tmp_path / "reference" / reference.FILE)
    with pytest.raises(HwpqError, match="not a reference"):
        load_reference(tmp_path / "reference")


def test_untied_models_are_evaluated_too(tmp_path: Path) -> None:
    directory = export(tmp_path, "fp8_e4m3", config=tiny_config(tie_word_embeddings=False))
    answer = make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    wanted = oracle(tmp_path / "model", directory, TOKENS)
    assert evaluate_export(directory, answer).kl_divergence == pytest.approx(wanted["kl"], rel=1e-4)


def test_unknown_dtype_and_absurd_loss_are_named() -> None:
    with pytest.raises(HwpqError, match="float64"):
        loading.evaluation_dtype("float64")
    with pytest.raises(HwpqError, match="destroyed"):
        reference.perplexity(701.0, "test")


@pytest.mark.slow
def test_workers_of_a_cluster_judge_samples_and_the_figures_are_the_same(tmp_path: Path) -> None:
    made = export(tmp_path, "int8")
    make_reference(tmp_path / "model", TOKENS, tmp_path / "reference")
    answer = load_reference(tmp_path / "reference")
    alone = evaluate_export(made, answer)
    with opened("dask", workers=2):
        shared = evaluate_export(made, answer, work=tmp_path / "work")
    assert replace(shared, seconds=alone.seconds) == alone
    assert sorted(part.name for part in (tmp_path / "work" / "parts").glob("*.json")) == ["0-3.json", "3-5.json"]
