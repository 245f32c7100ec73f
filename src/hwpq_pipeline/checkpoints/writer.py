"""Atomic writing: a reader sees the old artifact or the new one, never half of one.

A file is written to a temporary sibling and moved over its name with `os.replace`, which POSIX makes
atomic within a file system. A directory cannot replace a non-empty one in one step, so it is built as
`<dir>.partial` and swapped in by two renames; a crash between the two leaves the old one complete under
`<dir>.old`, which the next write puts back. No fsync: a power cut costs a rerun, not a wrong result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: transformers refuses safetensors files whose metadata does not name the framework.
FORMAT = {"format": "pt"}
SHARD_BYTES = 4 * 2**30


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
    partial = target.with_name(f"{target.name}.partial")
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


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one safetensors file atomically.

    Args:
        path: the file.
        tensors: by name; made contiguous and moved to the CPU here. They must not share memory.
        metadata: string pairs for the header, beside `{"format": "pt"}`.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(plain, partial, metadata={**FORMAT, **(metadata or {})})
        os.chmod(partial, 0o666 & ~_umask())  # safetensors creates it 0600
    return Path(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_weights(
    directory: str | Path,
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a model's weights as Hugging Face does: one `model.safetensors`, or shards and their index.

    Args:
        directory: an existing directory.
        names: tensors to write, in order.
        shapes: of each of them; with `dtype` they decide the shards before anything is read.
        read: gives a tensor by name; called once each, so that one shard at a time is in memory.
        dtype: of floating-point tensors on disk; others keep theirs.
        shard_bytes: a shard's size at most (one larger tensor makes one shard).
    """
    directory = Path(directory)
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in names:
        size = prod(shapes[name]) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size

    def load(name: str) -> torch.Tensor:
        tensor = read(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if len(shards) == 1:
        return [write_tensors(directory / "model.safetensors", {name: load(name) for name in names})]
    files, weight_map, total = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: load(name) for name in shard}
        files.append(write_tensors(directory / file, tensors))
        weight_map.update(dict.fromkeys(shard, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.append(write_json(directory / "model.safetensors.index.json", index))
    return files
