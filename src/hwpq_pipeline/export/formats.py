"""Export formats: what each is called, which variants it holds, who writes it.

Every variant has a compressed-tensors export, which is the one that is evaluated. The formats listed here are written
beside it where the parameter `export.formats` names them. Each is run again and compared with it before it is kept
(`comparison`), so no export computes something else than was evaluated. To add one, write its module with a `Format`
in it and list it in `further_formats`; nothing else in `src` changes (docs/add-an-export-format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import atomic_directory
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError

from .card import CardInfo, Storage, write_card
from .comparison import ReadBack, compare

STRUCTURES = ("dense", "2of4", "unstructured")


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: its word in `export.formats`, and the name of its directory.
        write: writes it: `write(model_dir, compressed_dir, target_dir, *, card)` gives back `target_dir`.
        storage: what the model card says of it.
        read_back: how its export is run again, to compare it; None for compressed-tensors, which the others are
            compared with.
        grids: names of the grids that it stores, besides no grid at all.
        structures: that it stores.
        mixes: whether its layers may have several grids.
    """

    name: str
    write: Callable[..., Path]
    storage: Storage
    read_back: ReadBack | None
    grids: tuple[str, ...] = tuple(GRIDS)
    structures: tuple[str, ...] = STRUCTURES
    mixes: bool = False

    def refusal(self, structure: str, grid: str | None) -> str | None:
        """Why the format cannot hold a variant; None if it can.

        Args:
            structure: of the variant.
            grid: of the variant, or None.
        """
        if structure not in self.structures:
            return f"{self.name} holds structure {' or '.join(self.structures)}, not {structure}"
        if grid is not None and grid not in self.grids:
            return f"{self.name} has no place for grid {grid}; it holds {', '.join(self.grids)}"
        return None

    def refusal_of(self, compressed: CompressedModel) -> str | None:
        """Why the format cannot hold a compressed model, whose layers may differ; None if it can."""
        if len(compressed.formats) > 1 and not self.mixes:
            return f"{self.name} holds one grid for all layers, and this variant has {len(compressed.formats)}"
        overrides = compressed.recipe.get("overrides") or ()
        pruned = {None if (part := one.get("selection")) is None else part["structure"] for one in overrides}
        mixed = any("selection" in one and not one["selection"] and one.get("quantization", 0) for one in overrides)
        if self.structures != STRUCTURES and (mixed or not pruned <= {None, *self.structures}):
            return f"{self.name} holds layers of structure {' or '.join(self.structures)} alone"
        grids: list[str | None] = [*sorted({grid for grid, _ in compressed.formats})] or [None]
        said = (self.refusal(compressed.structure, grid) for grid in grids)
        return next((one for one in said if one is not None), None)

    def check_all(self, compressed: CompressedModel) -> None:
        """Refuse a compressed model that the format cannot hold.

        Raises:
            HwpqError: it cannot.
        """
        if said := self.refusal_of(compressed):
            raise HwpqError(said, where=str(compressed.path), remedy="Use another export format for this variant.")

    def check(self, structure: str, grid: str | None, where: str) -> None:
        """Refuse a variant that the format cannot hold.

        Raises:
            HwpqError: it cannot; `where` names the variant.
        """
        if said := self.refusal(structure, grid):
            raise HwpqError(said, where=where, remedy="Use another export format for this variant.")

    @contextmanager
    def directory(
        self, dense: Checkpoint, compressed: CompressedModel, target_dir: str | Path, card: CardInfo | None
    ) -> Iterator[Path]:
        """Yield an empty folder for the export; it becomes `target_dir` with recipe and card, if it compares well.

        Args:
            dense: the dense checkpoint.
            compressed: the compressed model.
            target_dir: replaced when the new one is complete, and untouched on an error.
            card: what the model card says; without it the directory gets none.

        Raises:
            HwpqError: the export computes something else than the compressed-tensors export (`comparison.compare`).
        """
        with atomic_directory(target_dir) as folder:
            yield folder
            if self.read_back is not None:
                compare(self.read_back, folder, dense, compressed, name=self.name, where=str(compressed.path))
            compressed.write_recipe(folder)
            write_card(folder, card, self.storage)


def further_formats() -> dict[str, Format]:
    """The formats beside compressed-tensors, by name. Their modules are imported here, because they import torch."""
    from . import gguf, onnx, semi_structured

    formats = (gguf.FORMAT, gguf.FLOAT16, onnx.FORMAT, semi_structured.FORMAT)
    return {one.name: one for one in formats}
