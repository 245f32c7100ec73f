"""SHA-256 of files and directories: what a result was made from, and a run's key.

A directory's digest is the digest of the lines `<file digest>  <relative path>`, sorted by path, as `sha256sum` prints
them. It depends on names and contents only, not on times, owners or the order of a listing. The list of checksums that
a stage leaves in a directory is left out: it says nothing new.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from hwpq_pipeline.checkpoints.file_checksums import LISTING
from hwpq_pipeline.errors import HwpqError

logger = logging.getLogger(__name__)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of one file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_directory(path: str | Path) -> str:
    """Hex SHA-256 over every file below `path`, but the list of their checksums: relative names and contents."""
    root = Path(path)
    found = (file for file in root.rglob("*") if file.is_file() and file != root / LISTING)
    files = sorted((file.relative_to(root).as_posix(), file) for file in found)
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{sha256_file(file)}  {name}\n".encode())
    return digest.hexdigest()


def sha256_path(path: str | Path) -> str:
    """Hex SHA-256 of a file or a directory.

    Raises:
        HwpqError: there is nothing at `path`.
    """
    path = Path(path)
    if path.is_dir():
        return sha256_directory(path)
    if path.is_file():
        return sha256_file(path)
    raise HwpqError("there is nothing to digest", where=str(path), remedy="Run the step that makes it.")


def checked_digest(path: Path, expected: str | None) -> str:
    """The SHA-256 of a user's file or directory, compared with the expected one; without one, the log tells it.

    Raises:
        HwpqError: the digests differ; both are named.
    """
    found = sha256_path(path)
    if expected is None:
        logger.info("%s has sha256 %s. Name it in the configuration to have it checked.", path, found)
    elif found != expected.lower():
        raise HwpqError(
            f"wrong sha256: expected {expected.lower()}, found {found}",
            where=str(path),
            remedy="Correct the sha256 in the source's parameters, or the file if it was damaged.",
        )
    return found
