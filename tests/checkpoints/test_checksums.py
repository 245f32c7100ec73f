"""A flipped bit is found, wherever it is, and whatever reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints import checksums
from hwpq_pipeline.checkpoints.checksums import check_bytes, crc32
from hwpq_pipeline.checkpoints.reader import Checkpoint, read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors, write_weights
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "number": torch.tensor(7),
    "none": torch.empty(0, 4),
}


def flip(file: Path, place: int) -> None:
    """Flip one bit, counted in bytes from the end."""
    held = bytearray(file.read_bytes())
    held[-place] ^= 1
    file.write_bytes(held)


def check_all(file: Path) -> None:
    with safe_open(file, framework="pt") as handle:
        for name in TENSORS:
            check_bytes(handle, name, where=name, remedy="r")


def test_crc_of_pieces_is_that_of_the_whole() -> None:
    """The oracle is the check value that every description of CRC-32 gives for the digits 1 to 9."""
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert crc32([digits]) == crc32(digits.split(2)) == "cbf43926"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "t.safetensors", TENSORS)
    assert all(torch.equal(TENSORS[name], tensor) for name, tensor in read_tensors(file).items())
    whole, size = file.read_bytes(), sum(tensor.nbytes for tensor in TENSORS.values())
    for place in range(1, size + 1):
        flip(file, place)
        with pytest.raises(HwpqError, match=r"its bytes are not those that were written"):
            read_tensors(file)
        with pytest.raises(HwpqError, match="not those"):
            check_all(file)
        file.write_bytes(whole)
    read_tensors(file)


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    """safetensors' own order of the metadata changes from one call to the next."""
    tensors = {**TENSORS, "modèle\n": torch.ones(1)}
    assert len({write_tensors(tmp_path / "t.safetensors", tensors).read_bytes() for _ in range(20)}) == 1
    assert read_tensors(tmp_path / "t.safetensors").keys() == tensors.keys()


def test_a_large_tensor_is_checked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_PIECE", 40)  # two of the three rows
    file = write_tensors(tmp_path / "t.safetensors", {"matrix": TENSORS["matrix"]})
    with safe_open(file, framework="pt") as handle:
        check_bytes(handle, "matrix", where="w", remedy="r")


def test_files_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    flip(tmp_path / "t.safetensors", 1)
    read_tensors(tmp_path / "t.safetensors")


def test_a_damaged_list_of_checksums_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors", metadata={"crc32": "{"})
    with pytest.raises(HwpqError, match=r"t\.safetensors: a: cannot be read"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_list_of_checksums_that_lacks_a_tensor_is_damaged(tmp_path: Path) -> None:
    """A bit was flipped in the tensor's name there."""
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors", metadata={"crc32": '{"c": "00000000"}'})
    with pytest.raises(HwpqError, match=r"t\.safetensors: a: its bytes are not those"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_model_with_a_flipped_bit_is_not_loaded(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write_weights(model, tensors.items(), shard_bytes=100_000)
    load_causal_lm(model, torch.float32, remedy="r")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    file = model / index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    flip(file, 1)
    with pytest.raises(HwpqError, match="its bytes are not those that were written"):
        load_causal_lm(model, torch.float32, remedy="r")
    broken = next(name for name in load_file(file) if not torch.equal(load_file(file)[name], tensors[name]))
    with pytest.raises(HwpqError, match=broken):
        Checkpoint(model).tensor(broken)


def test_the_rows_of_a_stack_are_read_from_a_checked_one(tmp_path: Path) -> None:
    from hwpq_pipeline.checkpoints.matrices import Matrix

    stack = torch.randn(4, 6, 8)
    write_json(tmp_path / "config.json", {})
    write_weights(tmp_path, [("experts", stack)])
    matrix = Matrix("experts", part=2, parts=4)
    assert torch.equal(Checkpoint(tmp_path).weight(matrix).reshape(6, 8), stack[2])
    flip(tmp_path / "model.safetensors", 1)  # in the last slice; another one is read
    with pytest.raises(HwpqError, match="experts: its bytes are not those"):
        Checkpoint(tmp_path).weight(matrix)
