"""Kedro datasets that save all or nothing, and notice what was changed since.

Kedro's own datasets write into the target. A killed run then leaves half a file under the final name, and the next run
trusts it. Here everything is written beside the target and renamed into place, with a checksum that every load compares
(`checkpoints.file_checksums`). `AtomicDataset` wraps any file dataset; `PictureDataset` and `DirectoryDataset` take a
file or a directory that a node built in a scratch directory. What a killed process left beside the target goes with the
next save. The price: for a moment the disk holds the old version and the new one.
"""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError
from kedro.io.core import parse_dataset_definition

from hwpq_pipeline.checkpoints.file_checksums import (
    beside,
    check_directory,
    check_file,
    check_picture,
    crc32_of,
    list_directory,
)
from hwpq_pipeline.errors import HwpqError, reading
from hwpq_pipeline.processes import left_overs, mark, new_folder

_AGAIN = "Run the pipeline that makes it again."


class _PathDataset(AbstractDataset[Any, Any]):
    """A dataset at one path of the local file system."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    @property
    def path(self) -> Path:
        """The file or directory that holds the data."""
        return self._filepath

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _existing(self) -> Path:
        _put_back(self._filepath)
        if not self._filepath.exists():
            raise HwpqError(
                "no such file or directory",
                where=str(self._filepath),
                remedy="Run the pipeline that makes it, or all of them with `kedro run`",
            )
        return self._filepath


class AtomicDataset(_PathDataset):
    """Any Kedro file dataset, saved beside the target and renamed into place.

    Args:
        filepath: the file.
        dataset: the wrapped dataset's type or definition, without its filepath.
    """

    def __init__(self, *, filepath: str, dataset: str | dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        super().__init__(filepath=filepath, metadata=metadata)
        self._definition = {"type": dataset} if isinstance(dataset, str) else dict(dataset)

    def _wrapped(self, path: Path) -> AbstractDataset[Any, Any]:
        cls, arguments = parse_dataset_definition({**self._definition, "filepath": str(path)})
        return cls(**arguments)

    def load(self) -> Any:
        """Load with the wrapped dataset.

        Raises:
            HwpqError: the file is missing, or damaged.
        """
        path = self._existing()
        with reading(path, remedy=_AGAIN):
            check_file(path, remedy=_AGAIN)
            return self._wrapped(path).load()

    def save(self, data: Any) -> None:
        """Save with the wrapped dataset to a sibling, then rename it into place."""
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(self._filepath, "partial")
        try:
            self._wrapped(partial).save(data)
            _move_file(partial, self._filepath)
        finally:
            partial.unlink(missing_ok=True)


class PictureDataset(_PathDataset):
    """A PNG that a node built in a scratch directory. It loads as its path."""

    def load(self) -> Path:
        """The path of the file.

        Raises:
            HwpqError: the file is missing, or damaged.
        """
        path = self._existing()
        check_picture(path, remedy=_AGAIN)
        return path

    def save(self, data: Path) -> None:
        """Move the built file into place."""
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(self._filepath, "partial")
        try:
            shutil.move(data, partial)  # scratch space may be another disk
            os.replace(partial, self._filepath)
        finally:
            partial.unlink(missing_ok=True)


class DirectoryDataset(_PathDataset):
    """A directory that a node built in a scratch directory. It loads as its path."""

    def load(self) -> Path:
        """The path of the directory. Tensors are compared with their checksums when they are read.

        Raises:
            HwpqError: it is missing, or another of its files is missing or damaged.
        """
        path = self._existing()
        check_directory(path, remedy=_AGAIN)
        return path

    def save(self, data: Path) -> None:
        """Write the list of checksums, and move the built directory into place."""
        list_directory(Path(data))
        _move_directory(Path(data), self._filepath)


class ScratchDataset(_PathDataset):
    """A new, empty directory at every load, on the data's file system. It is removed when the process ends.

    A process that is killed leaves its directory behind, and the next one removes it (`processes`).
    """

    def load(self) -> Path:
        """Make the directory, and remove those of dead processes."""
        fresh = new_folder(self._filepath)
        atexit.register(shutil.rmtree, fresh, ignore_errors=True)
        return fresh

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Refused: scratch space is not an output."""
        raise DatasetError("nothing can be saved to scratch space")


class CacheDataset(_PathDataset):
    """A directory for downloads: made if it is missing, and kept."""

    def load(self) -> Path:
        """The directory."""
        self._filepath.mkdir(parents=True, exist_ok=True)
        return self._filepath

    def save(self, data: Any) -> None:  # noqa: ARG002
        """Refused: the rooms that use a cache fill it."""
        raise DatasetError("nothing can be saved to the cache")


def _hidden(target: Path, kind: str) -> Path:
    """A sibling's name that tells the process, and what it is to `target`."""
    return target.with_name(f".{mark()}.{kind}.{target.name}")


def _put_back(target: Path) -> None:
    """Give a target its place again, if a process died between the two renames that replace it."""
    for old in left_overs(target.parent, ".", f".old.{target.name}"):
        if not target.exists():
            os.replace(old, target)


def _tidy(target: Path) -> None:
    """Remove what dead processes left of a target."""
    _put_back(target)
    for old in left_overs(target.parent, ".", f".old.{target.name}"):
        shutil.rmtree(old, ignore_errors=True)
    for partial in left_overs(target.parent, ".", f".partial.{target.name}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def _move_file(built: Path, target: Path) -> None:
    """Replace `target` by `built`, and its checksum: a reader may find none for a moment, but never another file's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    sum_file = beside(target)
    _tidy(sum_file)
    partial = _hidden(sum_file, "partial")
    try:
        partial.write_text(f"{crc32_of(built)}\n", encoding="ascii")
        sum_file.unlink(missing_ok=True)
        os.replace(built, target)
        os.replace(partial, sum_file)
    finally:
        partial.unlink(missing_ok=True)


def _beside(built: Path, target: Path) -> Path:
    """The built directory; a copy of it beside the target where it is on another file system."""
    if built.stat().st_dev == target.parent.stat().st_dev:
        return built
    copy = _hidden(target, "partial")
    try:
        return shutil.copytree(built, copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def _move_directory(built: Path, target: Path) -> None:
    """Replace `target` by `built`; a whole version exists at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    built = _beside(built, target)
    if not target.is_dir():
        os.replace(built, target)
        return
    old = _hidden(target, "old")
    os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
