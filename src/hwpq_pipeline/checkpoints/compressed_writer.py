"""Writes a variant's compressed model between our stages; `checkpoints.compressed` says what the files hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.grids import GRIDS


def tensors_of(layer: str, quantized: Quantized) -> dict[str, Tensor]:
    """What the compressed model holds of a layer on a grid."""
    found = {f"{layer}.{part}": getattr(quantized, part) for part in ("codes", "scale")}
    if GRIDS[quantized.grid].stored_as == "e4m3":
        found[f"{layer}.tensor_scale"] = torch.tensor([quantized.tensor_scale])
    return found


class CompressedLayers(Protocol):
    """What `CompressedWriter` gets of an input group: names, tensors, and what the codes are."""

    @property
    def name(self) -> str: ...  # noqa: D102 (as in `method.steps.CompressedGroup`)
    @property
    def layers(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def grid(self) -> str | None: ...  # noqa: D102
    @property
    def group_size(self) -> int | None: ...  # noqa: D102


class CompressedWriter:
    """Writes a variant's compressed model a group at a time.

    Args:
        directory: an existing, empty directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._layers: list[str] = []
        self._formats: dict[str, tuple[str, int | None]] = {}
        self._replaced: list[str] = []
        self._embeddings: dict[str, str] = {}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Write new values of other tensors of the checkpoint, by name."""
        write_tensors(self.directory / "replaced.safetensors", tensors)
        self._replaced += tensors

    def embed(self, name: str, quantized: Quantized) -> None:
        """Write the rounded embedding or head of that name."""
        write_tensors(self.directory / f"{name}.safetensors", tensors_of(name, quantized))
        self._embeddings[name] = quantized.grid

    def add(self, group: CompressedLayers) -> None:
        """Write an input group's layers into a file of its name.

        Args:
            group: its layers' names and tensors, `<layer>.codes` and `<layer>.scale`, or `<layer>.weight`, of each.
        """
        write_tensors(self.directory / f"{group.name}.safetensors", group.tensors)
        self._note(group.layers, group.grid, group.group_size)

    def take(self, parts: Parts, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Take a group's file from the finished parts.

        Args:
            parts: each with `layers`, `grid`, `group_size` and `facts` told.
            name: of the group.

        Returns:
            Its facts by layer name.
        """
        told = parts.told(name)
        parts.hand_over(name, self.directory / f"{name}.safetensors")
        self._note(told["layers"], told["grid"], told["group_size"])
        facts: Mapping[str, Mapping[str, Any]] = told["facts"]
        return facts

    def _note(self, layers: Iterable[str], grid: str | None, group_size: int | None) -> None:
        names = list(layers)
        self._layers += names
        if grid is not None:
            self._formats |= dict.fromkeys(names, (grid, group_size))

    def close(self, variant: str, structure: str, recipe: Mapping[str, Any]) -> None:
        """Write `recipe.json`.

        Args:
            variant: the variant's name.
            structure: of its pruned layers; `dense` if there are none.
            recipe: in plain numbers.
        """
        grid, group_size = Counter(self._formats.values()).most_common(1)[0][0] if self._formats else (None, None)
        header: dict[str, Any] = {
            "variant": variant,
            "grid": grid,
            "group_size": group_size,
            "structure": structure,
            "recipe": recipe,
            "layers": self._layers,
        }
        others = {layer: pair for layer, pair in self._formats.items() if pair != (grid, group_size)}
        further = {"others": others, "replaced": self._replaced, "embeddings": self._embeddings}
        header |= {name: value for name, value in further.items() if value}
        write_json(self.directory / "recipe.json", header)
