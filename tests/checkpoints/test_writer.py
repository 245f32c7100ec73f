from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.digest import sha256_directory, sha256_path
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_tensors, write_weights
from hwpq_pipeline.errors import HwpqError


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def names_below(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def test_directory_is_whole_or_untouched(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(Interrupted), atomic_directory(target) as partial:  # noqa: PT012
        (partial / "b").write_text("half")
        raise Interrupted
    assert names_below(tmp_path) == ["out", "out/a"]
    with atomic_directory(target) as partial:
        (partial / "c").write_text("second")
    assert names_below(tmp_path) == ["out", "out/c"]


def test_directory_recovers_from_a_crash_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "good").write_text("kept")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(Interrupted), atomic_directory(tmp_path / "out"):
        raise Interrupted
    assert names_below(tmp_path) == ["out", "out/good"]


def test_json_leaves_the_old_file_on_an_error(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"a": "é"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert names_below(tmp_path) == ["a.json"]


def test_tensors_are_written_with_ordinary_permissions_and_name_the_framework(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    path = write_tensors(tmp_path / "x.safetensors", {"t": tensor})
    assert torch.equal(load_file(path)["t"], tensor)
    with safe_open(path, framework="pt") as stream:
        assert stream.metadata()["format"] == "pt"
    assert path.stat().st_mode & 0o777 == write_json(tmp_path / "j", {}).stat().st_mode & 0o777


def test_shards_cover_all_tensors_within_the_limit(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((index + 1, 100), float(index)) for index in range(5)}
    limit = 1300
    write_weights(tmp_path, tensors.items(), shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert len(files) == 4  # 400 and 800 bytes, then one each
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit


def test_one_shard_is_one_plain_file(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    write_weights(tmp_path, iter(tensors.items()))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for root, order in ((one, ("b", "a/c")), (two, ("a/c", "b"))):
        for name in order:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
    by_hand = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in ("a/c", "b"))
    assert sha256_directory(one) == hashlib.sha256(by_hand.encode()).hexdigest() == sha256_path(two)
    (two / "b").rename(two / "d")
    assert sha256_path(two) != sha256_path(one)
    with pytest.raises(HwpqError, match="nothing"):
        sha256_path(tmp_path / "none")
