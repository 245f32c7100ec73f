"""Hidden states of many tokens: in memory while they are few, in files past a limit.

A walk through a model's blocks reads and replaces each batch's states once a block. From files that costs two passes
over them, next to a block's products very little. They are read and written, not mapped: mapped pages would count as
the process's own memory.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.processes import new_folder

#: Bytes that are kept in memory.
IN_MEMORY = 2**26


class Spool:
    """Tensors by number, each of which may be replaced.

    Args:
        tensors: the first ones.
        directory: where files are made, in a directory of their own; the system's for temporary files by default.
        in_memory: bytes of all tensors up to which they stay in memory.
    """

    def __init__(
        self, tensors: Iterable[Tensor] = (), directory: Path | None = None, in_memory: int = IN_MEMORY
    ) -> None:
        self.directory, self.in_memory = directory, in_memory
        self._held: list[Tensor | None] = []
        self._kinds: list[tuple[torch.dtype, tuple[int, ...], torch.device]] = []
        self._bytes = 0
        self._root: Path | None = None
        for tensor in tensors:
            self.append(tensor)

    def close(self) -> None:
        """Remove the files; they go with the object otherwise."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._held)

    def append(self, tensor: Tensor) -> None:
        """One more tensor."""
        self._held.append(None)
        self._kinds.append((tensor.dtype, tuple(tensor.shape), tensor.device))
        self._bytes += tensor.nbytes
        if self._root is None and self._bytes > self.in_memory:
            self._root = new_folder(self.directory or Path(gettempdir()), "states-")
            weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
            for number, held in enumerate(self._held[:-1]):
                if held is not None:
                    self[number] = held
        self[len(self) - 1] = tensor

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._kinds[number] = (tensor.dtype, tuple(tensor.shape), tensor.device)
        if self._root is None:
            self._held[number] = tensor
            return
        self._held[number] = None
        (self._root / f"{number}.bin").write_bytes(_raw(tensor.cpu()).data)  # `tofile` hides why a disk refuses

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        if held is not None:
            return held
        dtype, shape, device = self._kinds[number]
        raw = torch.from_numpy(np.fromfile(f"{self._root}/{number}.bin", dtype=np.uint8))
        return raw.view(dtype).view(shape).to(device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))


def _raw(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
