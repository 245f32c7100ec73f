"""Atomic writing: a reader sees the old file or directory or the new one, never half of one.

A file is written to a temporary sibling and moved over its name with `os.replace`, which POSIX makes atomic within a
file system. A directory cannot replace a non-empty one in one step. It is built as `<dir>.partial` and swapped in by
two renames. A crash between the two leaves the old one complete as `<dir>.old`, and the next write puts it back.
There is no fsync: a power cut costs a rerun, not a wrong result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from hwpq_pipeline.checkpoints.checksums import metadata_of

#: transformers refuses safetensors files whose metadata does not name the framework.
FORMAT = {"format": "pt"}
#: A shard is in memory while it is written.
SHARD_BYTES = 3 * 2**27


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty `<target>.partial`; on success it becomes `target`, on an error it is removed.

    An earlier `target` stays untouched until the new one is complete.
    """
    target = Path(target)
    partial = target.with_name(target.name + ".partial")
    old = target.with_name(target.name + ".old")
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for stale in (partial, old):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling path; on success it is moved over `target`, on an error it is removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid4().hex[:12]}.partial")  # two may write the same file at once
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically: two-space indent, final newline, no NaN or infinity (they are not JSON)."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write one safetensors file atomically, with a checksum of each tensor.

    Args:
        path: the file.
        tensors: by name; they are made contiguous and moved to the CPU here, and must not share memory.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(plain, partial, metadata=FORMAT | metadata_of(plain))
        _sort_metadata(partial)
        os.chmod(partial, 0o666 & ~_umask())  # safetensors creates it 0600
    return Path(path)


def _sort_metadata(file: Path) -> None:
    """Put the entries of the metadata in order: safetensors writes them in another one each time."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_weights(
    directory: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model's weights as Hugging Face does: one `model.safetensors`, or numbered shards and their index.

    safetensors writes a file whole, so one shard's tensors are in memory at a time.

    Args:
        directory: an existing directory.
        tensors: names and tensors, taken one after the other; each tensor as it is stored.
        shard_bytes: largest size of a shard; a larger tensor makes a shard alone.
    """
    directory = Path(directory)
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total, held = 0, 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            write_tensors(_part(directory, len(shards)), shard)
            shards.append(list(shard))
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    write_tensors(_part(directory, len(shards)), shard)
    shards.append(list(shard))
    if len(shards) == 1:
        os.replace(_part(directory, 0), directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(_part(directory, number), directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def _part(directory: Path, number: int) -> Path:
    """A shard's file, until it is known how many shards there are."""
    return directory / f"shard-{number}"
