"""Kedro datasets that save all or nothing.

Kedro's own datasets write into the target. A killed run then leaves half a file under the final name, and the next run
trusts it. Here everything is written beside the target and renamed into place. `AtomicDataset` wraps any file dataset;
`FileDataset` and `DirectoryDataset` take a file or a directory that a node built in a scratch directory. The price: for
a moment the disk holds the old version and the new one.
"""

from __future__ import annotations

import atexit
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
from kedro.io import AbstractDataset, DatasetError
from kedro.io.core import parse_dataset_definition

from hwpq_pipeline.errors import HwpqError, reading


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
        with reading(path, remedy="Run the pipeline that makes it again."):
            return self._wrapped(path).load()

    def save(self, data: Any) -> None:
        """Save with the wrapped dataset to a sibling, then rename it into place."""
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        partial = self._filepath.with_name(f".{os.getpid()}.partial.{self._filepath.name}")
        try:
            self._wrapped(partial).save(data)
            os.replace(partial, self._filepath)
        finally:
            partial.unlink(missing_ok=True)


class FileDataset(_PathDataset):
    """A file that a node built in a scratch directory. It loads as its path."""

    def load(self) -> Path:
        """The path of the file."""
        return self._existing()

    def save(self, data: Path) -> None:
        """Move the built file into place."""
        _move_into_place(Path(data), self._filepath)


class DirectoryDataset(FileDataset):
    """A directory that a node built in a scratch directory. It loads as its path."""


class ScratchDataset(_PathDataset):
    """A new, empty directory at every load, on the data's file system. It is removed when the process ends.

    A process that is killed leaves its directory behind. The names tell the machine, the process and when it began, so
    the next process on that machine removes what belongs to none that lives.
    """

    def load(self) -> Path:
        """Make the directory, and remove those of dead processes."""
        self._filepath.mkdir(parents=True, exist_ok=True)
        mine = _process_mark(psutil.Process())
        machine = mine.rpartition("-")[0].rpartition("-")[0]
        for left in self._filepath.glob(f"{machine}-*-*.*"):
            if left.name.partition(".")[0] not in (mine, _mark_of(left.name)):
                shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(dir=self._filepath, prefix=f"{mine}."))
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


def _process_mark(process: psutil.Process) -> str:
    """`<machine>-<process id>-<when it began>`: an id is used again, but not with the same beginning."""
    machine = re.sub(r"[^A-Za-z0-9]+", "_", platform.node()) or "machine"
    return f"{machine}-{process.pid}-{int(process.create_time() * 100)}"


def _mark_of(name: str) -> str | None:
    """The mark of the living process that a directory's name tells the id of; None if there is none."""
    try:
        return _process_mark(psutil.Process(int(name.partition(".")[0].split("-")[-2])))
    except (psutil.Error, ValueError, IndexError):
        return None


def _move_into_place(built: Path, target: Path) -> None:
    """Replace `target` by `built`; a whole version exists at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        os.replace(built, target)
        return
    old = target.with_name(f".{os.getpid()}.old.{target.name}")
    os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
