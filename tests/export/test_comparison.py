"""Wrong writers, one fault each: the comparison refuses what they write, and nothing is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hwpq_pipeline.checkpoints import packed
from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export import gguf, gguf_blocks, gguf_metadata, onnx, semi_structured
from hwpq_pipeline.export.comparison import Logits, long_length
from hwpq_pipeline.export.formats import Format, further_formats
from tests.export.long_prompts import STATED, YARN, checkpoint
from tests.export.making import HEADS, make_compressed, make_two_of_four
from tests.tiny import tiny_checkpoint, tiny_config

Patch = pytest.MonkeyPatch


def gguf_withoutrope_factors(patch: Patch) -> None:
    patch.setattr(gguf, "rope_factors", lambda _rope: None)


def gguf_without_linear_scaling(patch: Patch) -> None:
    from gguf import GGUFWriter

    patch.setattr(GGUFWriter, "add_rope_scaling_factor", lambda _writer, _factor: None)


def gguf_with_another_theta(patch: Patch) -> None:
    from gguf import GGUFWriter

    real = GGUFWriter.add_rope_freq_base
    patch.setattr(GGUFWriter, "add_rope_freq_base", lambda writer, theta: real(writer, 2 * theta))


def gguf_without_biases(patch: Patch) -> None:
    real = gguf._names
    patch.setattr(gguf, "_names", lambda model: {n: t for n, t in real(model).items() if not n.endswith(".bias")})


def gguf_with_rows_in_transformers_order(patch: Patch) -> None:
    patch.setattr(gguf, "interleaved", lambda rows, _heads: rows)


def gguf_with_biases_in_transformers_order(patch: Patch) -> None:
    real = gguf_blocks.interleaved
    patch.setattr(gguf, "interleaved", lambda rows, heads: real(rows, heads if rows.dim() == 2 else None))


def gguf_with_a_key_that_nobody_compared(patch: Patch) -> None:
    real = gguf_metadata.add_shape

    def add(writer: Any, shape: Any) -> None:
        real(writer, shape)
        writer.add_logit_scale(2.0)

    patch.setattr(gguf, "add_shape", add)


def onnx_without_scaling(patch: Patch) -> None:
    real = onnx._tables

    def tables(shape: Any) -> Any:
        return real(replace(shape, rope=replace(shape.rope, type="default", amplitude=1.0)))

    patch.setattr(onnx, "_tables", tables)


def onnx_without_amplitude(patch: Patch) -> None:
    real = onnx._tables
    patch.setattr(onnx, "_tables", lambda shape: real(replace(shape, rope=replace(shape.rope, amplitude=1.0))))


def onnx_without_biases(patch: Patch) -> None:
    def linear(graph: Any, layer: str, hidden: str) -> str:
        product: str = graph._product(layer, hidden, f"{layer}.out")
        return product

    patch.setattr(onnx._Llama, "_linear", linear)


def packed_with_other_scales(patch: Patch) -> None:
    real = packed.pack_codes

    def pack(layer: str, quantized: Any, dtype: torch.dtype, *, where: str) -> Any:
        return real(layer, replace(quantized, scale=1.01 * quantized.scale), dtype, where=where)

    patch.setattr(semi_structured, "pack_codes", pack)


CASES: list[tuple[str, str, bool, Callable[[Patch], None]]] = [
    ("gguf", "llama3", False, gguf_withoutrope_factors),
    ("gguf-f16", "llama3", False, gguf_withoutrope_factors),
    ("gguf", "linear", False, gguf_without_linear_scaling),
    ("gguf", "biases", False, gguf_with_another_theta),
    ("gguf", "biases", True, gguf_without_biases),
    ("gguf", "biases", False, gguf_with_rows_in_transformers_order),
    ("gguf", "biases", True, gguf_with_biases_in_transformers_order),
    ("gguf", "biases", False, gguf_with_a_key_that_nobody_compared),
    ("onnx", "llama3", False, onnx_without_scaling),
    ("onnx", "linear", False, onnx_without_scaling),
    ("onnx", "biases", True, onnx_without_biases),
    ("semi-structured", "biases", False, packed_with_other_scales),
]


@pytest.mark.parametrize(("name", "stated", "biased", "fault"), CASES)
def test_a_wrong_writer_is_refused_and_the_earlier_export_stays(
    tmp_path: Path, monkeypatch: Patch, name: str, stated: str, biased: bool, fault: Callable[[Patch], None]
) -> None:
    model, target = checkpoint(tmp_path / "model", STATED[stated], biased=biased), tmp_path / "out"
    if name == "semi-structured":
        make_two_of_four(tmp_path / "compressed", "int8", None)
    else:
        make_compressed(tmp_path / "compressed", "int4", group_size=32, bfloat16_scales=True)
    one = further_formats()[name]
    one.write(model, tmp_path / "compressed", target)  # right: it passes
    before = sha256_directory(target)
    fault(monkeypatch)
    with pytest.raises(HwpqError, match=f"the {name} export") as found:
        one.write(model, tmp_path / "compressed", target)
    assert "\n" not in str(found.value)
    assert found.value.where == str(tmp_path / "compressed")
    assert sha256_directory(target) == before
    assert not list(tmp_path.glob("out.*"))


def test_onnx_without_yarn_s_amplitude_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    model = checkpoint(tmp_path / "model", YARN)
    make_compressed(tmp_path / "compressed", "int8")
    onnx_without_amplitude(monkeypatch)
    with pytest.raises(HwpqError, match=r"differ from the compressed-tensors export's by .* of their norm"):
        onnx.export_onnx(model, tmp_path / "compressed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(real: Format, logits: Callable[[Logits], Logits]) -> Format:
    assert real.read_back is not None
    opened = real.read_back.open
    return replace(real, read_back=replace(real.read_back, open=lambda folder: logits(opened(folder))))


def shifted(real: Logits) -> Logits:
    """Wrong at the last token only."""

    def logits(ids: torch.Tensor, kept: int) -> torch.Tensor:
        found = real(ids, kept).clone()
        found[-1] *= 1.5
        return found

    return logits


def not_numbers(real: Logits) -> Logits:
    return lambda ids, kept: real(ids, kept) * torch.nan


def raising(_real: Logits) -> Logits:
    def logits(_ids: torch.Tensor, _kept: int) -> torch.Tensor:
        raise RuntimeError("a kernel\nthat is not there")

    return logits


HOLDERS = {"gguf": (gguf, "FORMAT"), "gguf-f16": (gguf, "FLOAT16"), "onnx": (onnx, "FORMAT"),
           "semi-structured": (semi_structured, "FORMAT")}  # fmt: skip


@pytest.mark.parametrize("name", further_formats())
@pytest.mark.parametrize(
    ("fault", "said"),
    [(shifted, "at token 15 of 16 .* by 0.5 of their norm"), (not_numbers, "by nan of"), (raising, "a kernel")],
)
def test_every_format_is_compared(
    tmp_path: Path, monkeypatch: Patch, name: str, fault: Callable[[Logits], Logits], said: str
) -> None:
    """A new format fails here until it has a place in `HOLDERS` and writes inside `Format.directory`."""
    module, attribute = HOLDERS[name]
    monkeypatch.setattr(module, attribute, broken(getattr(module, attribute), fault))
    model = tiny_checkpoint(tmp_path / "model", tiny_config(**HEADS))
    make_two_of_four(tmp_path / "compressed", "int8", None)
    with pytest.raises(HwpqError, match=said) as found:
        further_formats()[name].write(model, tmp_path / "compressed", tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not list(tmp_path.glob("out*"))


def test_without_onnx_runtime_an_onnx_export_says_what_to_install(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = tiny_checkpoint(tmp_path / "model", tiny_config(**HEADS))
    make_compressed(tmp_path / "compressed", "int8")
    with pytest.raises(HwpqError, match="pip install onnxruntime"):
        onnx.export_onnx(model, tmp_path / "compressed", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "parameters", "length"),
    [
        ({"max_position_embeddings": 8192}, 135e6, 512),
        ({"max_position_embeddings": 128}, 1e5, 128),
        ({}, 1e5, 512),
        ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "linear", "factor": 2}}, 1e5, 4200),
        ({"max_position_embeddings": 8192, "rope_parameters":
          {"rope_type": "llama3", "original_max_position_embeddings": 1024}}, 1e5, 1088),
        ({"max_position_embeddings": 8192, "rope_parameters":
          {"full_attention": {"rope_type": "yarn", "original_max_position_embeddings": 2048},
           "sliding_attention": {"rope_type": "default"}}}, 1e5, 2112),
        ({"max_position_embeddings": 131072, "rope_parameters":
          {"rope_type": "llama3", "original_max_position_embeddings": 8192}}, 135e6, 1851),
        ({"max_position_embeddings": 131072, "rope_parameters":
          {"rope_type": "llama3", "original_max_position_embeddings": 8192}}, 70e9, 128),
    ],
)  # fmt: skip
def test_the_long_prompt_passes_the_original_length_where_it_costs_seconds(
    config: dict[str, Any], parameters: float, length: int
) -> None:
    assert long_length(SimpleNamespace(**config), int(parameters)) == length
