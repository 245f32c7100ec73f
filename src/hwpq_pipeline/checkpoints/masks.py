"""A variant's masks between our stages (`05_selection`): which weights are kept.

A directory with one safetensors file for each input group, named by it. A file holds `<layer>.keep` for each of the
group's layers: uint8, one bit a weight, set where it is kept (`compression.bits`). So masks are written as soon as they
are there, and read a group at a time. `index.json` names the file of each layer, so that a lost one is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json

INDEX = "index.json"


class Masks(Mapping[str, Tensor]):
    """A variant's packed keep-masks by layer name, each read when it is asked for.

    Args:
        path: the directory that `method.select.gather_masks` wrote.

    Raises:
        HwpqError: there is no index, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, str] = read_json(self.path / INDEX)

    def __reduce__(self) -> tuple[type[Masks], tuple[Path]]:
        return Masks, (self.path,)

    def __getitem__(self, layer: str) -> Tensor:
        return read_tensors(self.path / f"{self._files[layer]}.safetensors", [f"{layer}.keep"])[f"{layer}.keep"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def packed_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a group's file holds of its layers' packed keep-masks, uint8 (out, ⌈in / 8⌉), by layer name."""
    return {f"{layer}.keep": keep for layer, keep in masks.items()}


def write_index(directory: Path, files: Mapping[str, str]) -> Path:
    """Write which file each layer's mask is in, beside the files; the directory.

    Args:
        directory: of the files.
        files: names of the groups, by layer.
    """
    write_json(directory / INDEX, files)
    return directory
