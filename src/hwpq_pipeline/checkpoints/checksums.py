"""A checksum of each tensor, in the file that holds it.

safetensors finds a file that was cut, but not a bit that was flipped: the result would be other weights. So each file
that the pipeline writes names in its metadata the CRC-32 of each tensor's bytes, and every reader here compares it. A
tensor can still be read alone. The checksum travels with the file, whatever copies it (`dvc checkout`, a user), where
a file beside it could be left behind. CRC-32 finds accidents, not forgeries; a source's `sha256` is for those. It costs
about a second for each gigabyte, a small part of what is done with the tensors. Files of others have none, and are
taken as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

from hwpq_pipeline.errors import HwpqError, reading

#: The entry of a safetensors file's metadata.
ENTRY = "crc32"
#: Bytes of a stack's slice that are read at a time.
_PIECE = 2**26


def crc32(pieces: Iterable[torch.Tensor]) -> str:
    """The CRC-32 of a tensor's bytes, as eight hexadecimal digits.

    Args:
        pieces: the tensor, or its parts along the first dimension; on the CPU.
    """
    found = 0
    for piece in pieces:
        if piece.numel():
            found = zlib.crc32(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def metadata_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The entry for a file of these tensors."""
    return {ENTRY: json.dumps({name: crc32([tensor]) for name, tensor in tensors.items()}, separators=(",", ":"))}


def read_tensor(handle: Any, name: str, *, where: str, remedy: str) -> torch.Tensor:
    """A tensor of an open safetensors file, compared with its checksum.

    Args:
        handle: the file.
        name: of the tensor.
        where: the file and the tensor, for errors.
        remedy: what the user does about a damaged file.

    Raises:
        HwpqError: it cannot be read, or its bytes are not those that were written.
    """
    with reading(where, remedy=remedy):
        tensor: torch.Tensor = handle.get_tensor(name)
    _compare(handle, name, [tensor], where, remedy)
    return tensor


def check_bytes(handle: Any, name: str, *, where: str, remedy: str) -> None:
    """Compare a tensor with its checksum without holding it whole; for those that are read in parts.

    Args:
        handle, name, where, remedy: as for `read_tensor`.

    Raises:
        HwpqError: as `read_tensor`.
    """
    rows = handle.get_slice(name)
    shape = rows.get_shape()
    if not shape:
        read_tensor(handle, name, where=where, remedy=remedy)
        return
    step = max(1, _PIECE // max(rows[0:1].nbytes, 1))
    _compare(
        handle, name, (rows[start : min(start + step, shape[0])] for start in range(0, shape[0], step)), where, remedy
    )


@lru_cache(maxsize=8)
def _checksums(entry: str) -> dict[str, str]:
    """A file's entry, read once and not for each of its tensors."""
    found: dict[str, str] = json.loads(entry)
    return found


def _compare(handle: Any, name: str, pieces: Iterable[torch.Tensor], where: str, remedy: str) -> None:
    with reading(where, remedy=remedy):
        entry = (handle.metadata() or {}).get(ENTRY)
        intact = entry is None or _checksums(entry).get(name) == crc32(pieces)  # a list that lacks one is damaged
    if not intact:
        raise HwpqError("its bytes are not those that were written", where=where, remedy=remedy)
