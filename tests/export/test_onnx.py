"""The ONNX model in ONNX Runtime against transformers with the weights that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.onnx import export_onnx
from tests.export.making import layer_shapes, make_compressed
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

CASES = [
    ("fp8_e4m3", None), ("fp8_e5m2", None), ("int8", None), ("int4", 32), ("int4", 16), ("int4", None), (None, None),
]  # fmt: skip


def exported(tmp_path: Path, grid: str | None, group_size: int | None = None, config: Any = None) -> Path:
    tiny_checkpoint(tmp_path / "model", config)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure)
    return export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / "onnx")


class Runtime:
    """ONNX Runtime with a cache: what is given is added to what it saw."""

    def __init__(self, directory: Path, blocks: int = 2, key_heads: int = 2, head_size: int = 8) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
        self.names = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
        self.empty = (key_heads, 0, head_size)
        self.cache: dict[str, np.ndarray] = {}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.cache:
            empty = np.zeros((ids.shape[0], *self.empty), np.float32)
            self.cache = {f"past_key_values.{name}": empty for name in self.names}
        past = next(iter(self.cache.values())).shape[2]
        mask = np.ones((ids.shape[0], past + ids.shape[1]), np.int64)
        given = {"input_ids": ids.numpy(), "attention_mask": mask, **self.cache}
        logits, *present = self.session.run(["logits", *(f"present.{name}" for name in self.names)], given)
        self.cache = {f"past_key_values.{name}": part for name, part in zip(self.names, present, strict=True)}
        return torch.from_numpy(logits)


@pytest.mark.parametrize(("grid", "group_size"), CASES)
def test_logits_are_those_of_codes_times_scales(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    directory = exported(tmp_path, grid, group_size)
    structure = "dense" if grid else "unstructured"
    weights = make_compressed(tmp_path / "again", grid, group_size=group_size, structure=structure)
    dense, tokens = tiny_model(), tiny_tokens()
    for layer, weight in weights.items():
        dense.get_submodule(layer).weight.data.copy_(torch.from_numpy(weight))
    with torch.inference_mode():
        wanted = dense(tokens).logits
    torch.testing.assert_close(Runtime(directory).logits(tokens), wanted, rtol=1e-3, atol=2e-4)
    runtime = Runtime(directory)  # the same in pieces: a prompt, then a token at a time
    pieces = [runtime.logits(piece) for piece in tokens.split([5, 1, 1, 17], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=1e-3, atol=2e-4)


def test_an_untied_head_is_used(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    directory = exported(tmp_path, "int8", config=config)
    dense, tokens = tiny_model(config), tiny_tokens()
    for layer, weight in make_compressed(tmp_path / "again", "int8").items():
        dense.get_submodule(layer).weight.data.copy_(torch.from_numpy(weight))
    with torch.inference_mode():
        wanted = dense(tokens).logits
    torch.testing.assert_close(Runtime(directory).logits(tokens), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("grid", "group_size", "bits"), [("fp8_e4m3", None, 8), ("int8", None, 8), ("int4", 32, 4)])
def test_bytes_are_the_arithmetic(tmp_path: Path, grid: str, group_size: int | None, bits: int) -> None:
    directory = exported(tmp_path, grid, group_size)
    weights = sum(rows * columns for rows, columns in layer_shapes().values())
    scales = {"fp8_e4m3": sum(rows for rows, _ in layer_shapes().values()),
              "int8": sum(rows * -(-columns // 128) for rows, columns in layer_shapes().values()),
              "int4": weights // 32}[grid]  # fmt: skip
    others = 4 * (260 * 32 + 5 * 32) + 2 * 4 * 128 * 4  # embeddings, norms, rotary tables, float32
    size = (directory / "model.onnx.data").stat().st_size
    padding = 64 * (2 * len(layer_shapes()) + 8)
    assert 0 <= size - (weights * bits // 8 + 4 * scales + others) <= padding


def test_the_same_input_gives_the_same_bytes_with_card_and_tokenizer(tmp_path: Path) -> None:
    exported(tmp_path, "int4", 32)
    card = CardInfo("int4", "Four bits.", "tiny", "apache-2.0", "int4", "dense", format="onnx")
    first, second = (
        export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / name, card=card) for name in ("a", "b")
    )
    assert sha256_directory(first) == sha256_directory(second)
    assert "onnxruntime" in (first / "README.md").read_text()
    assert (first / "tokenizer.json").is_file()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", tiny_config(attention_bias=True))
    make_compressed(tmp_path / "compressed", "int8")
    with pytest.raises(HwpqError, match="no ONNX graph"):
        export_onnx(tmp_path / "model", tmp_path / "compressed", tmp_path / "onnx")
    assert not list(tmp_path.glob("onnx*"))
