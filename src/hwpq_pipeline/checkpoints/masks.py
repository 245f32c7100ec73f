"""A variant's masks between our stages (`05_selection`): which weights are kept.

A directory with one safetensors file for each input group, named by it. A file holds `<layer>.keep` for each of the
group's layers: uint8, one bit a weight, set where it is kept (`compression.bits`). So masks are written as soon as they
are there, and read a group at a time. `index.json` names the file of each layer, so that a lost one is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors

INDEX = "index.json"


class GroupMasks(Protocol):
    """What is written of an input group."""

    @property
    def name(self) -> str: ...  # noqa: D102 (as in `method.select.SelectedGroup`)
    @property
    def masks(self) -> Mapping[str, Tensor]: ...  # noqa: D102


class Masks(Mapping[str, Tensor]):
    """A variant's packed keep-masks by layer name, each read when it is asked for.

    Args:
        path: the directory that `MaskWriter` wrote.

    Raises:
        HwpqError: there is no index, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, str] = read_json(self.path / INDEX)

    def __getitem__(self, layer: str) -> Tensor:
        return read_tensors(self.path / f"{self._files[layer]}.safetensors", [f"{layer}.keep"])[f"{layer}.keep"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class MaskWriter:
    """Writes a variant's masks a group at a time.

    Args:
        directory: is made; it must not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, str] = {}
        directory.mkdir()

    def add(self, group: GroupMasks) -> None:
        """Write packed keep-masks, uint8 (out, ⌈in / 8⌉) by layer name; nothing for a group that is not pruned."""
        if group.masks:
            tensors = {f"{layer}.keep": keep for layer, keep in group.masks.items()}
            write_tensors(self.directory / f"{group.name}.safetensors", tensors)
            self._files |= dict.fromkeys(group.masks, group.name)

    def close(self) -> Path:
        """Write the index; the directory."""
        write_json(self.directory / INDEX, self._files)
        return self.directory
