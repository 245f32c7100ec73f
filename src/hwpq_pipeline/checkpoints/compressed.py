"""A variant's compressed model between our stages (`06_models`), in no engine's format.

`recipe.json` says how to read the tensors: `grid` (null where nothing is rounded), `group_size`, `structure` and
`layers`, and in `others` the grid and group size of layers that have other ones. It also says how they were made:
`variant`, and the `recipe` in plain numbers. Beside it is a safetensors file for each input group. For each layer it
holds `<layer>.codes` (out, in) and `<layer>.scale` (out, groups), and `<layer>.tensor_scale` (1) if its grid has one,
or `<layer>.weight` (out, in) where the layer was pruned only. `embeddings` has the grid of the embedding and the head,
which are held as layers are. `replaced` names other tensors of the checkpoint (norms) that have new values here. The
reader checks names, shapes, ranges and finiteness.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hwpq_pipeline.checkpoints.checksums import read_tensor
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import write_json
from hwpq_pipeline.compression.codes import Quantized, code_dtype, dequantize, on_grid
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.scales import stored_numbers
from hwpq_pipeline.errors import HwpqError, reading

_AGAIN = "Run the compress pipeline for this variant again."


class CompressedModel:
    """A variant's compressed model, read a tensor at a time.

    Args:
        path: its directory.

    Attributes:
        grid: a name in `compression.grids.GRIDS`, or None where nothing is rounded; of most layers.
        group_size: columns that share a scale; None for one scale a row; of most layers.
        others: grid and group size of layers that have other ones, by name.
        structure: `dense`, `2of4` or `unstructured`.
        variant: the variant's name.
        recipe: what was done, in plain numbers.
        layers: names of its layers.
        embeddings: the grid of the embedding and the head by name, where they are rounded.
        quantized: names of the layers that have codes and scales.

    Raises:
        HwpqError: missing or corrupt files, an unknown grid, or files that do not agree with the recipe.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        recipe = read_json(self.path / "recipe.json")
        try:
            self.grid: str | None = recipe["grid"]
            self.group_size: int | None = recipe["group_size"]
            self.structure: str = recipe["structure"]
            self.variant: str = recipe["variant"]
            self.recipe: dict[str, Any] = recipe["recipe"]
            self.layers: dict[str, None] = dict.fromkeys(recipe["layers"])
            self._replaced: tuple[str, ...] = tuple(recipe.get("replaced", ()))
            self.embeddings: dict[str, str] = dict(recipe.get("embeddings", {}))
            self.others = {layer: (str(grid), group) for layer, (grid, group) in recipe.get("others", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HwpqError(f"it lacks {error}", where=f"{self.path}/recipe.json", remedy=_AGAIN) from error
        tables = {(grid, None) for grid in self.embeddings.values()}
        for grid, group in {(self.grid, self.group_size), *self.others.values(), *tables}:
            self._check_grid(grid, group)
        self._handles: dict[str, Any] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            self._open(file)
        self.quantized = {layer: None for layer in self.layers if f"{layer}.codes" in self._handles}
        self._check_names()

    def write_recipe(self, directory: Path) -> None:
        """Write how it was made into an export: `recipe.json` with the variant's name and the recipe."""
        write_json(directory / "recipe.json", {"variant": self.variant, "recipe": self.recipe})

    def format_of(self, layer: str) -> tuple[str, int | None]:
        """Grid and group size of a quantized layer, or of the embedding or the head."""
        if layer in self.embeddings:
            return self.embeddings[layer], None
        return self.others.get(layer, (str(self.grid), self.group_size))

    @property
    def formats(self) -> list[tuple[str, int | None]]:
        """All pairs of grid and group size, the one of most layers first."""
        counted = Counter(map(self.format_of, self.quantized))
        return [pair for pair, _ in counted.most_common()]

    def _check_grid(self, grid: str | None, group_size: int | None) -> None:
        where = f"{self.path}/recipe.json"
        if grid is not None and grid not in GRIDS:
            remedy = f"Quantize to one of {', '.join(GRIDS)}."
            raise HwpqError(f"no export for grid {grid!r}", where=where, remedy=remedy)
        if group_size is not None and not isinstance(group_size, int):
            raise HwpqError(f"its group size is {group_size!r}", where=where, remedy=_AGAIN)
        fixed = grid is not None and GRIDS[grid].stored_as != "model"
        if fixed and group_size not in GRIDS[str(grid)].group_sizes:
            raise HwpqError(f"grid {grid} has no groups of {group_size}", where=where, remedy=_AGAIN)
        if group_size is not None and (grid is None or not GRIDS[grid].group_sizes):
            what = f"grid {grid} with groups of {group_size} has no engine"
            raise HwpqError(what, where=where, remedy="Leave the group size out.")

    def _open(self, file: Path) -> None:
        with reading(file, what="corrupt safetensors file", remedy=_AGAIN):
            handle = safe_open(file, framework="pt")
        self._handles.update(dict.fromkeys(handle.keys(), handle))

    def _check_names(self) -> None:
        wanted = set(self._replaced)
        for layer in (*self.layers, *self.embeddings):
            wanted |= {f"{layer}.{part}" for part in self._parts(layer)}
        if missing := sorted(wanted - set(self._handles)):
            raise HwpqError(
                f"{len(missing)} tensors are missing, first {missing[0]}", where=str(self.path), remedy=_AGAIN
            )
        if extra := sorted(set(self._handles) - wanted):
            what = f"{len(extra)} tensors are not in the recipe, first {extra[0]}"
            raise HwpqError(what, where=str(self.path), remedy=_AGAIN)
        if (self.grid is None) == bool(self.quantized):
            what = f"grid {self.grid} with {len(self.quantized)} quantized layers"
            raise HwpqError(what, where=f"{self.path}/recipe.json", remedy=_AGAIN)

    def _parts(self, layer: str) -> tuple[str, ...]:
        if layer not in self.quantized and layer not in self.embeddings:
            return ("weight",)
        grid = GRIDS.get(self.format_of(layer)[0])  # none where the header and the files contradict each other
        return ("codes", "scale", "tensor_scale") if grid and grid.stored_as == "e4m3" else ("codes", "scale")

    def _tensor(self, name: str) -> Tensor:
        return read_tensor(self._handles[name], name, where=f"{self.path}: {name}", remedy=_AGAIN)

    def read_quantized(self, layer: str, shape: tuple[int, ...]) -> Quantized:
        """A layer's codes and scales, checked against the dense weight's `shape` (out, in) and the grid.

        Raises:
            HwpqError: another shape or dtype, a code off the grid, or a scale that is no positive number.
        """
        codes, scale = self._tensor(f"{layer}.codes"), self._tensor(f"{layer}.scale")
        where = f"{self.path}: {layer}"
        name, group_size = self.format_of(layer)
        grid = GRIDS[name]
        groups = shape[1] // group_size if group_size else 1
        if codes.dtype != code_dtype(grid) or tuple(codes.shape) != tuple(shape):
            raise HwpqError(
                f"codes are {codes.dtype} {tuple(codes.shape)}, expected {code_dtype(grid)} {tuple(shape)}",
                where=where,
                remedy=_AGAIN,
            )
        if tuple(scale.shape) != (shape[0], groups) or shape[1] % groups:
            raise HwpqError(
                f"scale has shape {tuple(scale.shape)}, expected {(shape[0], groups)}",
                where=where,
                remedy=_AGAIN,
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise HwpqError("a scale is not a positive number", where=where, remedy=_AGAIN)
        factor = 1.0
        if grid.stored_as != "model":
            factor = self._tensor_scale(layer) if grid.stored_as == "e4m3" else factor
            if scale.dtype != torch.float32 or not stored_numbers(grid, scale.dtype, factor).hold(scale):
                raise HwpqError(f"a scale is no number that {grid.name} stores", where=where, remedy=_AGAIN)
        if not on_grid(codes, grid):
            raise HwpqError(f"a code is not on grid {grid.name}", where=where, remedy=_AGAIN)
        return Quantized(codes, scale, grid.name, group_size, factor)

    def _tensor_scale(self, layer: str) -> float:
        found = self._tensor(f"{layer}.tensor_scale")
        if found.shape != (1,) or not bool((found > 0) & torch.isfinite(found)) or math.frexp(float(found))[0] != 0.5:
            raise HwpqError("its tensor's scale is no power of two", where=f"{self.path}: {layer}", remedy=_AGAIN)
        return float(found)

    def read_weight(self, layer: str, shape: tuple[int, ...]) -> Tensor:
        """The weight of a layer that was pruned only, checked against the dense one's `shape` (out, in).

        Raises:
            HwpqError: another shape, or NaN or infinity in it.
        """
        weight = self._tensor(f"{layer}.weight")
        if tuple(weight.shape) != tuple(shape) or not weight.is_floating_point():
            raise HwpqError(
                f"weight is {weight.dtype} {tuple(weight.shape)}, expected floats {tuple(shape)}",
                where=f"{self.path}: {layer}",
                remedy=_AGAIN,
            )
        if not bool(torch.isfinite(weight).all()):
            raise HwpqError("weights are NaN or infinite", where=f"{self.path}: {layer}", remedy=_AGAIN)
        return weight

    def dequantized(self, layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A layer's weight as an engine sees it, (out, in): scale times code in float32, or in `dtype` if only pruned.

        Raises:
            HwpqError: as `read_quantized` and `read_weight`.
        """
        if layer in self.quantized or layer in self.embeddings:
            return dequantize(self.read_quantized(layer, shape))
        return self.read_weight(layer, shape).to(dtype)

    def replaced(self) -> dict[str, Tensor]:
        """Tensors of the checkpoint that are no compressed layers and have new values, by name."""
        return {name: self._tensor(name) for name in self._replaced}

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype` if every scale is a number of that dtype, else float32. So no scale changes its value."""
        for layer in (*self.quantized, *self.embeddings):
            scale = self._tensor(f"{layer}.scale")
            if not torch.equal(scale.to(dtype).to(scale.dtype), scale):
                return torch.float32
        return dtype


def open_compressed(model_dir: str | Path, compressed_dir: str | Path) -> tuple[Checkpoint, CompressedModel]:
    """A dense checkpoint and a compressed model of it, which gives some of the dense tensors new values.

    Raises:
        HwpqError: one of them is damaged, or the compressed model has a layer that the dense one lacks.
    """
    dense, compressed = Checkpoint(model_dir), CompressedModel(compressed_dir)
    layers = layer_map(model_dir)
    known = {*layers.names, *(table.name for table in layers.tables)}
    if lost := sorted({*compressed.layers, *compressed.embeddings} - known):
        raise HwpqError(
            f"the dense model has no layer {lost[0]}",
            where=str(dense.path),
            remedy="Compress this model again: the compressed layers belong to another one.",
        )
    dense.replace(compressed.replaced())
    return dense, compressed
