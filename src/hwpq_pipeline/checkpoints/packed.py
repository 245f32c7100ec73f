"""The packed 2:4 checkpoint: half of the weights are missing, on disk and in memory. It is written and read here.

For each 2:4 layer, `packed.safetensors` holds (`compression.packing` has the bits):

    codes          tensors                                                           of the dense 2:4 layer's bytes
    none           weight_kept (out, in/2) in the dense model's dtype                9/16 of 16-bit weights
    8 bits         weight_kept (out, in/2) float8_e4m3fn or int8, and weight_scale   5/8
    at most 4      weight_kept (out, in/4) uint8, two codes a byte, and weight_scale 3/4 of 4-bit codes
    all of these   weight_positions (out, ⌈in/8⌉) uint8

Scales are (out, groups). Other tensors are those of the dense model; a rounded embedding or head is `weight` in codes
and `weight_scale` (out, 1). `packed.json` holds the version, the grid and the layers' shapes (out, in). The weights are
not in `model.safetensors`, so a loader that does not know the format finds no weights. Otherwise it would find a model
that lacks half of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.codes import Quantized, scaled
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.packing import pack_nibbles, pack_two_of_four, unpack_nibbles
from hwpq_pipeline.errors import HwpqError

VERSION = 1
HEADER, WEIGHTS = "packed.json", "packed.safetensors"
AGAIN = "Export the variant again with format semi-structured."
_NIBBLE_BITS = 4


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer.

    Attributes:
        kept: (out, in / 2) weights or codes; codes of at most 4 bits as int8.
        positions: (out, ⌈in / 8⌉) uint8.
        scale: (out, groups), or None for weights.
    """

    kept: Tensor
    positions: Tensor
    scale: Tensor | None


class PackedCheckpoint:
    """A packed checkpoint, read whole.

    Args:
        directory: where it is.

    Attributes:
        layers: names of the packed layers.
        tensors: all tensors by name.

    Raises:
        HwpqError: it is missing, damaged, or of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        header = read_json(directory / HEADER)
        if header.get("version") != VERSION:
            raise HwpqError(f"packed format {header.get('version')!r}", where=f"{directory}/{HEADER}", remedy=AGAIN)
        self.layers: list[str] = list(header["layers"])
        self.tensors = read_tensors(directory / WEIGHTS)

    def take(self, layer: str) -> PackedLayer:
        """A layer, taken out of `tensors`.

        Raises:
            HwpqError: its values or positions are missing.
        """
        kept, positions, scale = (
            self.tensors.pop(f"{layer}.weight_{part}", None) for part in ("kept", "positions", "scale")
        )
        if kept is None or positions is None:
            raise HwpqError("its packed tensors are missing", where=layer, remedy=AGAIN)
        return PackedLayer(unpack_nibbles(kept) if kept.dtype == torch.uint8 else kept, positions, scale)

    def rest(self) -> dict[str, Tensor]:
        """What is left once the layers are taken; rounded tables as float32 values."""
        found = dict(self.tensors)
        for name in [name for name in found if name.endswith(".weight_scale")]:
            weight, scale = name.removesuffix("_scale"), found.pop(name)
            found[weight] = scaled(found[weight], scale)
        return found


def is_packed(directory: str | Path) -> bool:
    """Whether a directory holds a packed checkpoint."""
    return (Path(directory) / HEADER).is_file()


def pack_weight(layer: str, weight: Tensor, dtype: torch.dtype, *, where: str) -> dict[str, Tensor]:
    """The tensors of a layer that was pruned only.

    Args:
        layer: its name.
        weight: (out, in).
        dtype: that the kept weights are stored in.
        where: the layer's place, for errors.

    Raises:
        HwpqError: the weight is not 2:4.
    """
    kept, positions = pack_two_of_four(weight, where=where)
    return {f"{layer}.weight_kept": kept.to(dtype), f"{layer}.weight_positions": positions}


def pack_codes(layer: str, quantized: Quantized, scale_dtype: torch.dtype, *, where: str) -> dict[str, Tensor]:
    """The tensors of a layer on a grid.

    Args:
        layer: its name.
        quantized: codes (out, in) and scales (out, groups).
        scale_dtype: that the scales are stored in.
        where: the layer's place, for errors.

    Raises:
        HwpqError: the codes are not 2:4.
    """
    kept, positions = pack_two_of_four(quantized.codes, where=where)
    if GRIDS[quantized.grid].bits <= _NIBBLE_BITS:
        kept = pack_nibbles(kept)
    return {
        f"{layer}.weight_scale": quantized.scale.to(scale_dtype),
        f"{layer}.weight_kept": kept,
        f"{layer}.weight_positions": positions,
    }


def write_packed(
    directory: Path, grid: str | None, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    """Write `packed.json` and `packed.safetensors`.

    Args:
        directory: an existing directory.
        grid: of the codes, None for weights.
        shapes: (out, in) of each packed layer, by name.
        tensors: by name: those of `pack_weight` and `pack_codes`, and the rest of the model.
    """
    layers = {layer: list(shape) for layer, shape in shapes.items()}
    write_json(directory / HEADER, {"version": VERSION, "grid": grid, "layers": layers})
    write_tensors(directory / WEIGHTS, tensors)
