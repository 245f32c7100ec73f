"""A GGUF file's header, walked with limits before a library reads it.

A header says how many entries follow and how long each is, and a library believes it: an array of 2³¹ entries keeps it
busy for an hour, an array of arrays of arrays ends in a recursion. Here every count is held against the bytes that are
left in the file, so that a walk costs no more than the file is long, and nothing is kept.

Layout (little-endian): `GGUF`, version, tensor count, entry count; each entry a name, a type and a value; each tensor a
name, its dimensions, a type and an offset. A string is its length and its bytes. An array is a type, a count and its
values.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from hwpq_pipeline.errors import HwpqError

_MOST_ENTRIES, _MOST_TENSORS, _MOST_NAME, _MOST_DIMENSIONS = 100_000, 1_000_000, 65_536, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_header(file: Path) -> None:
    """Walk a GGUF file's header.

    Raises:
        HwpqError: it is no GGUF, of a version that is not read, or asks for more than the file holds.
    """
    with file.open("rb") as stream:
        if file.stat().st_size < 24:
            raise _wrong(file, "too short for a header")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Walk(data, file).all()
            except struct.error as error:
                raise _wrong(file, "its header ends early") from error


def _wrong(file: Path, what: str) -> HwpqError:
    return HwpqError(f"corrupt GGUF file ({what})", where=str(file), remedy="Fetch it again, or correct the path.")


class _Walk:
    """A place in the file that moves forward only."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data, self.file, self.at = data, file, 0

    def all(self) -> None:
        """The whole header."""
        magic, self.at = self.data[:4], 4
        (version,) = self.take("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise _wrong(self.file, f"it begins with {magic!r}, version {version}")
        tensors, entries = self.take("<QQ")
        if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
            raise _wrong(self.file, f"{tensors} tensors and {entries} entries")
        for _ in range(entries):
            name = self.string(_MOST_NAME)
            (kind,) = self.take("<I")
            self.value(kind, name)
        for _ in range(tensors):
            self.string(_MOST_NAME)
            (dimensions,) = self.take("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise _wrong(self.file, f"a tensor of {dimensions} dimensions")
            sizes = self.take(f"<{dimensions}Q")
            _, offset = self.take("<IQ")
            if any(size > len(self.data) * 8 for size in sizes) or offset > len(self.data):
                raise _wrong(self.file, "a tensor larger than the file")

    def take(self, form: str) -> tuple[int, ...]:
        """The next values."""
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self, most: int) -> str:
        """The next string; its beginning, to name it by."""
        (length,) = self.take("<Q")
        self.skip(length, most)
        return self.data[self.at - length : self.at][:64].decode("utf-8", "replace")

    def skip(self, length: int, most: int) -> None:
        """Go on by some bytes that the file must have."""
        if length > most or self.at + length > len(self.data):
            raise _wrong(self.file, f"{length} bytes where {len(self.data) - self.at} are left")
        self.at += length

    def value(self, kind: int, name: str) -> None:
        """The next value."""
        if kind == _STRING:
            self.string(len(self.data))
        elif kind != _ARRAY:
            self.skip(self.size(kind, name), len(self.data))
        else:
            inner, count = self.take("<IQ")
            if inner == _STRING:
                if count > len(self.data) // 8:
                    raise _wrong(self.file, f"{name} has {count} entries")
                for _ in range(count):
                    self.string(len(self.data))
            else:
                self.skip(self.size(inner, name) * count, len(self.data))

    def size(self, kind: int, name: str) -> int:
        """Bytes of a plain value."""
        if kind not in _SIZES:
            raise _wrong(self.file, f"{name} is of type {kind}, or an array of arrays")
        return _SIZES[kind]
