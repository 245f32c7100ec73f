"""Rounded embeddings and heads in every format: logits of its own runtime against a model with the values by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.quality import evaluate_export, make_reference
from hwpq_pipeline.evaluation.size import measure_size
from hwpq_pipeline.export import compressed_tensors, gguf, onnx, semi_structured
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.comparison import Logits, model_logits
from hwpq_pipeline.export.gguf_reading import open_gguf
from hwpq_pipeline.method.embeddings import rounded_embeddings
from hwpq_pipeline.method.fitting import misfits
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Quantization
from hwpq_pipeline.runtime import load_packed
from hwpq_pipeline.runtime.tables import Int8Embedding, Int8Head
from tests.export.making import HEADS, make_two_of_four, random_codes
from tests.kernels.packed import needs_compiler
from tests.tiny import VOCABULARY, tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

TABLES = ("model.embed_tokens", "lm_head")
WIDTH = 32


def loaded(directory: Path) -> Logits:
    return model_logits(load_causal_lm(directory, torch.float32, remedy="r"))


FORMATS: dict[str, tuple[Callable[..., Path], Callable[[Path], Logits]]] = {
    "compressed-tensors": (compressed_tensors.export_checkpoint, loaded),
    "gguf": (gguf.export_gguf, open_gguf),
    "onnx": (onnx.export_onnx, onnx._open),
    "semi-structured": (semi_structured.export_semi_structured, semi_structured._open),
}


def embed(compressed: Path, grid: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Give a compressed model rounded tables, written by hand; their values, float32."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name in names:
        codes = random_codes(grid, (VOCABULARY, WIDTH), generator)
        scale = ((0.1 + torch.rand(VOCABULARY, 1, generator=generator)) / 200).bfloat16().float()
        save_file({f"{name}.codes": codes, f"{name}.scale": scale}, compressed / f"{name}.safetensors")
        values[name] = codes.float() * scale
    header = json.loads((compressed / "recipe.json").read_text())
    (compressed / "recipe.json").write_text(json.dumps({**header, "embeddings": dict.fromkeys(names, grid)}))
    return values


def made(tmp_path: Path, grid: str, *, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Sources of an export, and a model with the values that it stands for."""
    config = tiny_config(**HEADS, tie_word_embeddings=tied)
    tiny_checkpoint(tmp_path / "model", config, dtype=dtype)
    weights = make_two_of_four(tmp_path / "compressed", "int4", 32)
    tables = embed(tmp_path / "compressed", grid, TABLES[:1] if tied else TABLES)
    dense = tiny_model(config).to(dtype).float()
    for name, weight in {**weights, **tables}.items():
        dense.get_submodule(name).weight.data.copy_(weight)
    return dense


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_runtime_computes_with_the_rounded_tables(tmp_path: Path, name: str, grid: str, tied: bool) -> None:
    dense, (write, opened) = made(tmp_path, grid, tied=tied), FORMATS[name]
    export = write(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    tokens = tiny_tokens()[:1]
    with torch.inference_mode():
        wanted = dense(tokens).logits[0]
        got = opened(export)(tokens, tokens.shape[1])
    rounded_again = name == "gguf" and grid != "int8"
    far = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(far.max()) < (0.1 if rounded_again else 1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_norms_that_were_healed_are_in_every_format(tmp_path: Path, name: str) -> None:
    dense, (write, opened) = made(tmp_path, "int8", tied=True, dtype=torch.bfloat16), FORMATS[name]
    norms = {f"model.layers.{block}.input_layernorm.weight": torch.rand(WIDTH) + 0.5 for block in range(2)}
    save_file(norms, tmp_path / "compressed" / "replaced.safetensors")
    header = json.loads((tmp_path / "compressed" / "recipe.json").read_text())
    (tmp_path / "compressed" / "recipe.json").write_text(json.dumps({**header, "replaced": list(norms)}))
    for norm, weight in norms.items():
        dense.get_parameter(norm).data.copy_(weight.bfloat16())
    tokens = tiny_tokens()[:1]
    with torch.inference_mode():
        wanted = dense(tokens).logits[0]
        got = opened(write(tmp_path / "model", tmp_path / "compressed", tmp_path / "export"))(tokens, tokens.shape[1])
    assert float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 1e-3


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_the_native_runtime_keeps_the_codes(tmp_path: Path, tied: bool) -> None:
    """It rounds the inputs of layers to INT8, and those of the head to bfloat16."""
    dense = made(tmp_path, "int8", tied=tied)
    semi_structured.export_semi_structured(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    model = load_packed(tmp_path / "export", native=True)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), Int8Head)
    tokens = tiny_tokens()[:1]
    with torch.inference_mode():
        wanted, got = dense(tokens).logits, model(tokens).logits
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, tokens.shape[1] + 3)
    assert float((got - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_a_byte_a_number_and_the_scales(tmp_path: Path, tied: bool) -> None:
    made(tmp_path, "int8", tied=tied, dtype=torch.bfloat16)
    write = compressed_tensors.export_checkpoint
    rounded = measure_size(write(tmp_path / "model", tmp_path / "compressed", tmp_path / "one"), tmp_path / "model")
    header = json.loads((tmp_path / "compressed" / "recipe.json").read_text())
    del header["embeddings"]
    for name in TABLES:
        (tmp_path / "compressed" / f"{name}.safetensors").unlink(missing_ok=True)
    (tmp_path / "compressed" / "recipe.json").write_text(json.dumps(header))
    plain = measure_size(write(tmp_path / "model", tmp_path / "compressed", tmp_path / "two"), tmp_path / "model")
    tables, scales = (1, 2) if tied else (2, 2)  # a tied head has scales of its own
    saved = VOCABULARY * (tables * WIDTH - 2 * scales)
    # The layers' scales are float32 here, and all of a checkpoint's scales have one dtype.
    assert plain.expected_bytes - rounded.expected_bytes == saved - 2 * VOCABULARY * scales
    headers = 1_000
    assert plain.size_bytes - rounded.size_bytes == pytest.approx(saved - 2 * VOCABULARY * scales, abs=headers)
    stored = Checkpoint(tmp_path / "one")
    assert stored.tensor("model.embed_tokens.weight").dtype == torch.int8
    assert ("lm_head.weight" in stored) is not tied
    assert (rounded.coverage, rounded.sparsity) == (plain.coverage, plain.sparsity)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", ["int8", "fp8_e4m3"])
def test_tables_are_rounded_to_the_nearest_code_of_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str, tied: bool
) -> None:
    monkeypatch.setattr("hwpq_pipeline.method.embeddings._ROWS", 33)
    model = tiny_checkpoint(tmp_path / "model", tiny_config(tie_word_embeddings=tied), dtype=torch.bfloat16)
    dense = load_file(model / "model.safetensors")
    found = {table.name: quantized for table, quantized in rounded_embeddings(model, grid)}
    assert list(found) == list(TABLES[:1] if tied else TABLES)
    for name, quantized in found.items():
        weight = dense[f"{name}.weight"].float()
        weight, quantized = weight[kept := weight.any(1)], replace(quantized, codes=quantized.codes[kept])
        quantized = replace(quantized, scale=quantized.scale[kept])  # the padding's row is zero
        largest = weight.abs().amax(1, keepdim=True)
        torch.testing.assert_close(quantized.scale, largest / (127 if grid == "int8" else 448), rtol=2**-8, atol=0)
        assert torch.equal(quantized.scale.bfloat16().float(), quantized.scale)
        codes = torch.arange(-127, 128.0) if grid == "int8" else torch.arange(256, dtype=torch.uint8)
        if grid != "int8":
            codes = codes.view(torch.float8_e4m3fn).float()
            codes = codes[~codes.isnan()]
        nearest = ((weight / quantized.scale)[..., None] - codes).abs().amin(-1)
        mine = (weight / quantized.scale - quantized.codes.float()).abs()
        torch.testing.assert_close(mine, nearest, rtol=0, atol=1e-4)
    assert list(rounded_embeddings(model, None)) == []


def test_what_transformers_would_not_read_is_refused_before_a_run(tmp_path: Path) -> None:
    layers = layer_map(tiny_checkpoint(tmp_path / "model"))
    four_bits = Recipe(quantization=Quantization("mxfp4", "nearest", 32), embeddings="int8")
    assert [error.what for error in misfits(four_bits, layers, "v")] == [
        "transformers unpacks grid mxfp4 when it loads, and no further grid beside it"
    ]
    assert misfits(Recipe(quantization=Quantization("int4", "nearest", 32), embeddings="int8"), layers, "v") == []


def test_a_table_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "int8", tied=False)
    tiny_checkpoint(tmp_path / "tied")
    with pytest.raises(HwpqError, match="has no layer lm_head"):
        compressed_tensors.export_checkpoint(tmp_path / "tied", tmp_path / "compressed", tmp_path / "export")
    (tmp_path / "compressed" / "lm_head.safetensors").unlink()
    with pytest.raises(HwpqError, match=r"tensors are missing, first lm_head.codes"):
        CompressedModel(tmp_path / "compressed")


def test_the_card_tells_of_them(tmp_path: Path) -> None:
    made(tmp_path, "int8", tied=True)
    info = CardInfo("v", "d", "o/m", "mit", "int4", "2of4", embeddings="int8")
    compressed_tensors.export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export", card=info)
    assert "the embedding and the head: 8-bit integer weights" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_with_a_rounded_head_is_evaluated_beside_the_dense_one(tmp_path: Path, tied: bool) -> None:
    """Against the formulas on transformers' own logits, in float64."""
    dense = tiny_model(tiny_config(**HEADS, tie_word_embeddings=tied))
    rounded = made(tmp_path, "int8", tied=tied)
    model, tokens = tmp_path / "model", tiny_tokens(4, 24)
    export = compressed_tensors.export_checkpoint(model, tmp_path / "compressed", tmp_path / "export")
    reference = make_reference(model, tokens, tmp_path / "reference")
    found = evaluate_export(export, reference, tokens, model_dir=model)
    with torch.inference_mode():
        p, q = (one(tokens).logits[:, :-1].double().log_softmax(-1) for one in (dense, rounded))
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    nll = -q.gather(-1, tokens[:, 1:, None])
    assert found.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)
    with pytest.raises(HwpqError, match="its lm_head is not the dense model's"):
        evaluate_export(export, reference, tokens)
