"""Activation statistics on disk: one safetensors file a decoder block, and an index.

`index.json` names, for each block, its file and its input groups: the layers fed by one and the same tensor
(q/k/v; gate/up), which therefore share one Gram matrix. A group is named by its first layer in module order
and holds the tensor `<group>.gram`, shape (in, in) = Σ x xᵀ over all tokens, or in diagonal mode
`<group>.energy`, shape (in,) = Σ x_j², both float32. Sums, not means: statistics of two sets of tokens are
merged by adding them, and files are of use one at a time, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.reader import read_json, read_tensors
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_tensors
from hwpq_pipeline.errors import HwpqError

FORMAT = 1
_AGAIN = "Run the calibrate pipeline again."


@dataclass(frozen=True)
class InputGroup:
    """Layers fed by the same tensor.

    Attributes:
        name: the first of `layers`.
        features: length of an input vector.
        layers: names of the layers, in module order.
        block: index of the decoder block.
    """

    name: str
    features: int
    layers: tuple[str, ...]
    block: int


class Statistics:
    """Statistics that were written by `collect_statistics` or `merge_statistics`, read a group at a time.

    Args:
        path: the directory.

    Attributes:
        mode: `gram` or `diagonal`.
        tokens: number of tokens summed over.
        dtype: of the forward pass that gave them, `float32` or `bfloat16`.

    Raises:
        HwpqError: the index or a block's file is missing, or the index is not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = read_json(self.path / "index.json")
        try:
            if self.index["format"] != FORMAT or self.index["mode"] not in ("gram", "diagonal"):
                raise ValueError(f"format {self.index['format']}, mode {self.index['mode']}")
            self.mode: str = self.index["mode"]
            self.tokens = int(self.index["tokens"])
            self.dtype = str(self.index.get("dtype", "float32"))
            if self.dtype not in ("float32", "bfloat16"):
                raise ValueError(f"dtype {self.dtype}")
            self._files = [str(block["file"]) for block in self.index["blocks"]]
            self._groups = {
                group["name"]: InputGroup(group["name"], int(group["features"]), tuple(group["layers"]), number)
                for number, block in enumerate(self.index["blocks"])
                for group in block["groups"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise HwpqError(
                f"not an index of statistics ({error})", where=str(self.path / "index.json"), remedy=_AGAIN
            ) from error
        self._of_layer = {layer: group.name for group in self._groups.values() for layer in group.layers}
        for file in self._files:
            if not (self.path / file).is_file():
                raise HwpqError("no such file", where=str(self.path / file), remedy=_AGAIN)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._files)

    @property
    def layers(self) -> list[str]:
        """Names of all layers that have statistics."""
        return list(self._of_layer)

    def groups(self, block: int | None = None) -> list[InputGroup]:
        """All input groups, or those of one block, in module order."""
        return [group for group in self._groups.values() if block is None or group.block == block]

    def group_of(self, layer: str) -> str:
        """Name of the input group that a layer belongs to.

        Raises:
            HwpqError: there are no statistics of this layer.
        """
        if layer not in self._of_layer:
            raise HwpqError(f"no statistics of layer {layer}", where=str(self.path), remedy=_AGAIN)
        return self._of_layer[layer]

    def gram(self, group: str) -> torch.Tensor:
        """`Σ x xᵀ`, shape (in, in), float32, of a group (or of the group of a layer).

        Raises:
            HwpqError: the statistics are diagonal, the file is corrupt, or the group is unknown.
        """
        if self.mode != "gram":
            raise HwpqError(
                "the statistics hold the diagonal only",
                where=str(self.path),
                remedy="Set calibration mode to gram and run the calibrate pipeline again.",
            )
        return self._read(group, "gram", 2)

    def energy(self, group: str) -> torch.Tensor:
        """`Σ x_j²`, shape (in,), float32, of a group (or of the group of a layer); in both modes."""
        if self.mode == "gram":
            return self._read(group, "gram", 2).diagonal().clone()
        return self._read(group, "energy", 1)

    def _read(self, name: str, suffix: str, dimensions: int) -> torch.Tensor:
        group = self._groups[self.group_of(name)]
        file = self.path / self._files[group.block]
        tensor = read_tensors(file, [f"{group.name}.{suffix}"])[f"{group.name}.{suffix}"]
        if tuple(tensor.shape) != (group.features,) * dimensions:
            raise HwpqError(
                f"shape {tuple(tensor.shape)} for {group.features} features",
                where=f"{file}: {group.name}.{suffix}",
                remedy=_AGAIN,
            )
        return tensor


class StatisticsWriter:
    """Writes a directory of statistics a block at a time.

    Args:
        directory: an existing, empty directory.
        mode: `gram` or `diagonal`.
    """

    def __init__(self, directory: Path, mode: str) -> None:
        self.directory, self.mode = directory, mode
        self._blocks: list[dict[str, Any]] = []

    def block(self, groups: Sequence[tuple[str, Sequence[str]]], tensors: dict[str, torch.Tensor]) -> None:
        """Write the next block.

        Args:
            groups: name and layers of each input group, in module order.
            tensors: the sum of each group, by its name.
        """
        suffix = "gram" if self.mode == "gram" else "energy"
        file = f"block_{len(self._blocks):03d}.safetensors"
        write_tensors(self.directory / file, {f"{name}.{suffix}": tensor for name, tensor in tensors.items()})
        entries = [
            {"name": name, "features": tensors[name].shape[0], "layers": list(layers)} for name, layers in groups
        ]
        self._blocks.append({"file": file, "groups": entries})

    def close(self, tokens: int, **facts: Any) -> None:
        """Write the index."""
        index = {"format": FORMAT, "mode": self.mode, "tokens": tokens, **facts, "blocks": self._blocks}
        write_json(self.directory / "index.json", index)


def merge_statistics(directories: Sequence[str | Path], target: str | Path) -> Path:
    """Add statistics of disjoint sets of tokens, collected with the same model and mode.

    Args:
        directories: of each part.
        target: the directory to write.

    Raises:
        HwpqError: there is no part, or the parts differ in mode or groups.
    """
    parts = [Statistics(directory) for directory in directories]
    if not parts:
        raise HwpqError("nothing to merge", where=str(target), remedy="Give one directory of statistics at least.")
    first = parts[0]
    for part in parts[1:]:
        if (part.mode, part.groups()) != (first.mode, first.groups()):
            raise HwpqError(
                f"its mode or layers differ from those of {first.path}",
                where=str(part.path),
                remedy="Merge statistics of one model, collected in one mode.",
            )
    with atomic_directory(target) as partial:
        writer = StatisticsWriter(partial, first.mode)
        for block in range(first.blocks):
            groups = [(group.name, group.layers) for group in first.groups(block)]
            read = Statistics.gram if first.mode == "gram" else Statistics.energy
            writer.block(
                groups,
                {name: sum(read(part, name).double() for part in parts).float() for name, _ in groups},  # type: ignore[union-attr]
            )
        writer.close(sum(part.tokens for part in parts), dtype=first.dtype)
    return Path(target)
