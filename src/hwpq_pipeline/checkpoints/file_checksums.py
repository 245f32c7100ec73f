"""A checksum beside each file that has none inside.

A tensor's is in its safetensors file (`checksums`), a picture's in PNG itself. JSON and CSV hold no place for one that
their other readers would not see. Parquet checks its pages, but not its footer. In each of them a flipped bit can be
another number. So a table or JSON that a stage saves gets `<file>.crc32` beside it, and a directory gets
`checksums.json` with a line for each of its files, null for safetensors. Both are outputs as the files are, so what
copies one copies the other. A file without one is of others, or of an earlier version, and is taken as it is.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.writer import write_json
from hwpq_pipeline.errors import HwpqError

#: Of a directory.
LISTING = "checksums.json"
_PIECE = 2**22
_PNG = b"\x89PNG\r\n\x1a\n"


def beside(file: Path) -> Path:
    """Where a file's checksum stands."""
    return file.with_name(f"{file.name}.crc32")


def crc32_of(file: Path) -> str:
    """The CRC-32 of a file's bytes, as eight hexadecimal digits."""
    found = 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def check_file(file: Path, *, remedy: str) -> None:
    """Compare a file with the checksum beside it, if there is one.

    Raises:
        HwpqError: its bytes are not those that were written.
    """
    try:
        expected = beside(file).read_bytes()
    except FileNotFoundError:
        return
    if expected != f"{crc32_of(file)}\n".encode():
        raise _other(file, remedy)


def check_picture(file: Path, *, remedy: str) -> None:
    """Compare the parts of a PNG file (length, kind, bytes, CRC-32) with their checksums.

    Raises:
        HwpqError: its bytes are not those that were written.
    """
    data = file.read_bytes()
    kind, at = b"", len(_PNG)
    while kind != b"IEND" and data.startswith(_PNG):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind, expected = data[at + 4 : at + 8], data[end : end + 4]
        if zlib.crc32(data[at + 4 : end]).to_bytes(4) != expected:
            raise _other(file, remedy)
        at = end + 4
    if at != len(data):
        raise _other(file, remedy)


def list_directory(directory: Path) -> None:
    """Write the checksums of a directory's files into it."""
    (directory / LISTING).unlink(missing_ok=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {
        path.relative_to(directory).as_posix(): None if path.suffix == ".safetensors" else crc32_of(path)
        for path in files
    }
    write_json(directory / LISTING, listed)


def check_directory(directory: Path, *, remedy: str) -> None:
    """Compare the files of a directory with its list, if it has one.

    Raises:
        HwpqError: the list cannot be read, a file of it is missing, or its bytes are not those that were written.
    """
    if not (directory / LISTING).exists():
        return
    try:
        listed = read_json(directory / LISTING)
    except HwpqError as error:
        raise HwpqError(error.what, where=error.where, remedy=remedy) from error
    for name, expected in listed.items():
        file = directory / name
        if not file.is_file():
            raise HwpqError("no such file", where=str(file), remedy=remedy)
        if file.suffix != ".safetensors" and crc32_of(file) != expected:
            raise _other(file, remedy)


def _other(file: Path, remedy: str) -> HwpqError:
    return HwpqError("its bytes are not those that were written", where=str(file), remedy=remedy)
