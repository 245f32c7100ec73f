"""Files for workers that do not see the run's disk: they travel by an address that both sides reach.

Any file system of fsspec serves (`s3://…`, `gs://…`, `abfs://…`); who may read and write there is for its own variables
of the environment to say. A call is pickled with its paths and its parts replaced:

    a path that is there       by its content's place at the address; a worker fetches it once, into its own folder
    the parts that it writes   by ones that a worker writes to its own disk and sends; the run fetches them

So nothing else knows of it. All of a run lies in a folder of its own, which is removed when the run ends.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import fsspec
from torch import Tensor

from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.errors import HwpqError, said
from hwpq_pipeline.inert import masked
from hwpq_pipeline.work.content import content_of

logger = logging.getLogger(__name__)


class Carrier:
    """What a run has at the address.

    Args:
        address: a folder of a file system, such as `s3://bucket/prefix`.

    Raises:
        HwpqError: it cannot be written to.
    """

    def __init__(self, address: str) -> None:
        self.address = f"{address.rstrip('/')}/{uuid4().hex}"
        self._sent: set[str] = set()
        self._fetched: set[str] = set()
        self._parts: dict[str, Parts] = {}
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.address)
            self.files.pipe(f"{self.root}/begun", b"")
        except Exception as error:  # each file system has its own
            raise HwpqError(
                f"cannot be written to ({said(error)})",
                where=f"execution.files: {masked(address)}",
                remedy="Correct the address, or the rights in the environment.",
            ) from error

    def packed(self, function: Callable[..., Any]) -> bytes:
        """The function with what it needs sent; from now on `collect` looks for the parts that it writes."""
        self._parts = {}
        stream = io.BytesIO()
        _Pickler(self, stream).dump(function)
        return stream.getvalue()

    def send(self, path: Path) -> str:
        """Send a file or folder, if its content is not there; its place."""
        place = f"inputs/{content_of(path)}/{path.name}"
        if place not in self._sent:
            self.files.put(str(path), f"{self.root}/{place}", recursive=True)
            self._sent.add(place)
        return place

    def outbox(self, parts: Parts) -> str:
        """A place where workers send these parts."""
        place = f"parts/{uuid4().hex}"
        self._parts[place] = parts
        return place

    def collect(self) -> None:
        """Fetch the parts that have come since the last time. A part's JSON file is written last, and fetched last."""
        self.files.invalidate_cache()  # a listing would be an old one
        for place, parts in self._parts.items():
            for told in sorted(self.files.glob(f"{self.root}/{place}/*.json")):
                if told not in self._fetched:
                    name = told.rpartition("/")[2].removesuffix(".json")
                    for suffix in (".safetensors", ".json"):
                        self._fetch(f"{self.root}/{place}/{name}{suffix}", parts.folder / f"{name}{suffix}")
                    self._fetched.add(told)

    def _fetch(self, remote: str, local: Path) -> None:
        if self.files.exists(remote):
            partial = local.with_name(f"{local.name}.partial")
            self.files.get(remote, str(partial))
            os.replace(partial, local)

    def close(self) -> None:
        """Remove all of the run. What cannot be removed is told, and ends no run."""
        try:
            self.files.rm(self.root, recursive=True)
        except Exception as error:  # noqa: BLE001 (each file system has its own)
            logger.warning("%s stays: %s", masked(self.address), said(error))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles paths as what is at the address, and parts as what comes from there."""

    def __init__(self, carrier: Carrier, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.carrier = carrier

    def reducer_override(self, value: Any) -> Any:
        """A path that is there, and parts, in other words; all else as it is."""
        if isinstance(value, Parts):
            return SentParts, (self.carrier.address, self.carrier.outbox(value))
        if isinstance(value, Path) and value.exists():
            return fetched, (self.carrier.address, self.carrier.send(value))
        return super().reducer_override(value)


def fetched(address: str, place: str) -> Path:
    """On a worker: what is at a place of the address, in the worker's own folder."""
    local = own_folder(address) / place
    if not local.exists():
        files, root = fsspec.core.url_to_fs(address)
        local.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=local.parent) as scratch:
            partial = Path(scratch) / local.name
            files.get(f"{root}/{place}", str(partial), recursive=True)
            try:
                os.replace(partial, local)
            except OSError:  # another thread was first
                if not local.exists():
                    raise
    return local


class SentParts(Parts):
    """On a worker: parts that are sent as soon as they are written.

    Args:
        address: of the run.
        place: of the parts there.
    """

    def __init__(self, address: str, place: str) -> None:
        super().__init__(own_folder(address) / place)
        self.address, self.place = address, place

    def keep(self, name: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """As `Parts.keep`; the files go on from here."""
        super().keep(name, tensors, told)
        files, root = fsspec.core.url_to_fs(self.address)
        for suffix in (".safetensors", ".json"):
            local = self.folder / f"{name}{suffix}"
            if local.exists():
                files.put(str(local), f"{root}/{self.place}/{name}{suffix}")
                local.unlink()


def own_folder(address: str) -> Path:
    """This worker's folder for a run, which Dask removes when the worker ends."""
    from distributed import get_worker

    return _folder_of(get_worker().local_directory, address)


def forget_files(address: str, dask_worker: Any) -> None:
    """On a worker: remove what it has of a run.

    Args:
        address: of the run.
        dask_worker: given by Dask, under this name.
    """
    shutil.rmtree(_folder_of(dask_worker.local_directory, address), ignore_errors=True)


def _folder_of(directory: str, address: str) -> Path:
    return Path(directory) / "hwpq" / address.rpartition("/")[2]
