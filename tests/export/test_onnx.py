"""The ONNX model in ONNX Runtime against transformers with the weights that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.onnx import export_onnx
from hwpq_pipeline.runtime.onnx_session import Session
from tests.export.making import HEADS, layer_shapes, make_compressed
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

CASES = [
    ("fp8_e4m3", None), ("fp8_e5m2", None), ("int8", None), ("int4", 32), ("int4", 16), ("int4", None), (None, None),
]  # fmt: skip


def exported(tmp_path: Path, grid: str | None, group_size: int | None = None, config: Any = None) -> Path:
    tiny_checkpoint(tmp_path / "model", config or tiny_config(**HEADS))
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure)
    return export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / "onnx")


def logits(session: Session, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.logits(ids.numpy()))


@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_logits_are_those_of_codes_times_scales(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    directory = exported(tmp_path, grid, group_size)
    structure = "dense" if grid else "unstructured"
    weights = make_compressed(tmp_path / "again", grid, group_size=group_size, structure=structure)
    dense, tokens = tiny_model(tiny_config(**HEADS)), tiny_tokens()
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(torch.from_numpy(weight))
    with torch.inference_mode():
        wanted = dense(tokens).logits
    torch.testing.assert_close(logits(Session(directory), tokens), wanted, rtol=1e-3, atol=2e-4)
    # In pieces: prompts and a token of each at a time; of one prompt, a longer piece behind the cache, too.
    for batch, pieces in ((len(tokens), [21, 1, 1, 1]), (1, [5, 1, 1, 17])):
        session = Session(directory)
        found = [logits(session, piece) for piece in tokens[:batch].split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), wanted[:batch], rtol=1e-3, atol=2e-4)


def test_an_untied_head_is_used(tmp_path: Path) -> None:
    config = tiny_config(**HEADS, tie_word_embeddings=False)
    directory = exported(tmp_path, "int8", config=config)
    dense, tokens = tiny_model(config), tiny_tokens()
    for layer, weight in make_compressed(tmp_path / "again", "int8").items():
        dense.get_submodule(layer).weight.data.copy_(torch.from_numpy(weight))
    with torch.inference_mode():
        wanted = dense(tokens).logits
    torch.testing.assert_close(logits(Session(directory), tokens), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("grid", "group_size", "bits"), [("fp8_e4m3", None, 8), ("int8", None, 8), ("int4", 32, 4)])
def test_bytes_are_the_arithmetic(tmp_path: Path, grid: str, group_size: int | None, bits: int) -> None:
    directory = exported(tmp_path, grid, group_size)
    weights = sum(rows * columns for rows, columns in layer_shapes().values())
    scales = {"fp8_e4m3": sum(rows for rows, _ in layer_shapes().values()),
              "int8": sum(rows * -(-columns // 128) for rows, columns in layer_shapes().values()),
              "int4": weights // 32}[grid]  # fmt: skip
    others = 4 * (260 * 32 + 5 * 32) + 2 * 8 * 128 * 4  # embeddings, norms, rotary tables, float32
    size = (directory / "model.onnx.data").stat().st_size
    padding = 64 * (2 * len(layer_shapes()) + 8)
    assert 0 <= size - (weights * bits // 8 + 4 * scales + others) <= padding


def test_the_same_input_gives_the_same_bytes_with_card_and_tokenizer(tmp_path: Path) -> None:
    exported(tmp_path, "int4", 32)
    card = CardInfo("int4", "Four bits.", "tiny", "apache-2.0", "int4", "dense")
    first, second = (
        export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / name, card=card) for name in ("a", "b")
    )
    assert sha256_directory(first) == sha256_directory(second)
    assert "onnxruntime" in (first / "README.md").read_text()
    assert (first / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden_act": "gelu"}, "activation 'gelu'"), ({"num_attention_heads": 4}, "heads of 8 numbers")],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tiny_checkpoint(tmp_path / "model", tiny_config(**{**HEADS, **changes}))
    make_compressed(tmp_path / "compressed", "int8")
    with pytest.raises(HwpqError, match=said):
        export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / "onnx")
    assert not list(tmp_path.glob("onnx*"))
