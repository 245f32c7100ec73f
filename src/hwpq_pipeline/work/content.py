"""What a result depends on, as one key: inputs by their content, settings, code, and the kind of processor.

What a killed run left behind is gone on from if, and only if, its key is the key of the run that finds it. So the key
has all that changes a byte of the result:

    inputs      of each file its name and content; of safetensors files that this package wrote the header alone, which
                holds a checksum of each tensor (`checkpoints.checksums`): so gigabytes need not be read again
    settings    the recipe, numbers of tokens, and the like, as JSON
    code        every source file of this package, and the versions of what computes
    processors  the instruction set, and the GPU if there is one: other kernels round otherwise. Not the number of
                threads: products, and our kernels, give the same bytes with any

A changed comment begins the work again. That costs minutes now and then; a rule about which changes count would cost
trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.checksums import ENTRY
from hwpq_pipeline.checkpoints.digest import sha256_file
from hwpq_pipeline.errors import HwpqError

_COMPUTES = ("torch", "numpy", "numba", "transformers", "compressed-tensors")
#: A header of safetensors is no longer than that.
_HEADER = 100_000_000


def work_key(inputs: Mapping[str, Path], **settings: Any) -> str:
    """The key of a result, 32 hexadecimal digits.

    Args:
        inputs: files or folders, by what they are.
        settings: what else the result depends on, in plain values.

    Raises:
        HwpqError: an input is missing.
    """
    facts = {
        "inputs": {name: content_of(path) for name, path in inputs.items()},
        "settings": settings,
        "code": code_version(),
        "processors": _processors(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def content_of(path: Path) -> str:
    """A digest of a file, or of all files below a folder with their names.

    Raises:
        HwpqError: there is nothing.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise HwpqError("no such file or directory", where=str(path), remedy="Run the pipeline that makes it.")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = (f"{_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokens_digest(tokens: np.ndarray[Any, Any] | Tensor) -> str:
    """A digest of token ids and their shape."""
    plain = np.ascontiguousarray(np.asarray(tokens), dtype=np.int64)
    return hashlib.sha256(str(plain.shape).encode() + plain.tobytes()).hexdigest()


@cache
def code_version() -> str:
    """A digest of this package's sources and of the versions of what computes; also what a worker must agree on."""
    root = Path(__file__).resolve().parents[1]
    sources = sorted(file for file in root.rglob("*") if file.suffix in (".py", ".cpp", ".h"))
    lines = [f"{sha256_file(file)}  {file.relative_to(root).as_posix()}" for file in sources]
    lines += [f"{name} {version(name)}" for name in _COMPUTES]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _processors() -> list[str]:
    found = [torch.backends.cpu.get_cpu_capability()]
    return [*found, torch.cuda.get_device_name()] if torch.cuda.is_available() else found


def _file(path: Path) -> str:
    header = _checked_header(path) if path.suffix == ".safetensors" else None
    if header is None:
        return sha256_file(path)
    return hashlib.sha256(header + str(path.stat().st_size).encode()).hexdigest()


def _checked_header(path: Path) -> bytes | None:
    """The header of a safetensors file in which every tensor has a checksum; None of another file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= _HEADER else b""
    try:
        entries = json.loads(header)
        known = json.loads(entries.pop("__metadata__", {}).get(ENTRY, "null"))
    except (ValueError, AttributeError):
        return None
    return header if isinstance(known, dict) and known.keys() == entries.keys() else None


code_version()  # now, while what is on the disk is what is imported
