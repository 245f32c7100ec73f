"""A variant's masks between our stages (`05_selection`): which weights are kept.

One safetensors file holds `<layer>.keep` for each layer: uint8, one bit a weight, set where it is kept
(`compression.bits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from hwpq_pipeline.checkpoints.reader import read_names, read_tensors
from hwpq_pipeline.checkpoints.writer import write_tensors


class Masks(Mapping[str, Tensor]):
    """A variant's packed keep-masks by layer name, each read when it is asked for.

    Args:
        path: the file that `write_masks` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names = [name.removesuffix(".keep") for name in read_names(self.path)]

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self._names:
            raise KeyError(layer)
        return read_tensors(self.path, [f"{layer}.keep"])[f"{layer}.keep"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_masks(path: str | Path, masks: Mapping[str, Tensor]) -> Path:
    """Write packed keep-masks, uint8 (out, ⌈in / 8⌉) by layer name, whole or not at all."""
    return write_tensors(path, {f"{layer}.keep": keep for layer, keep in masks.items()})
