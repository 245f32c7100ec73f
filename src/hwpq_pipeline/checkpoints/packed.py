"""The packed 2:4 checkpoint: half of the weights are missing, on disk and in memory. It is written and read here.

For each 2:4 layer, `packed.safetensors` holds (`compression.packing` has the bits):

    codes          tensors                                                           of the dense 2:4 layer's bytes
    none           weight_kept (out, in/2) in the dense model's dtype                9/16 of 16-bit weights
    8 bits         weight_kept (out, in/2) float8_e4m3fn or int8, and weight_scale   5/8
    at most 4      weight_kept (out, in/4) uint8, two codes a byte, and weight_scale 3/4 of 4-bit codes
    all of these   weight_positions (out, ⌈in/8⌉) uint8

Scales are (out, groups). Other tensors are those of the dense model; a rounded embedding or head is `weight` in codes
and `weight_scale` (out, 1). `quantization_config` in `config.json` says what the file holds (`packed_form`), with
`quant_method: hwpq`, by which vLLM finds the plugin. The weights are not in `model.safetensors`, so a loader that does
not know the format finds no weights. Otherwise it would find a model that lacks half of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.packed_checks import check_finite, check_layers, check_names
from hwpq_pipeline.checkpoints.packed_form import NIBBLE_BITS, SECTION, WEIGHTS, PackedForm
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.codes import Quantized, scaled
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.packing import pack_nibbles, pack_two_of_four, unpack_nibbles
from hwpq_pipeline.errors import HwpqError


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer.

    Attributes:
        kept: (out, in / 2) weights or codes; codes of at most 4 bits as int8.
        positions: (out, ⌈in / 8⌉) uint8.
        scale: (out, groups), or None for weights.
        four_bits: whether the codes are stored as two a byte.
    """

    kept: Tensor
    positions: Tensor
    scale: Tensor | None
    four_bits: bool = False


class PackedCheckpoint:
    """A packed checkpoint, read whole.

    Args:
        directory: where it is.

    Attributes:
        form: what it holds.
        tensors: all tensors by name.

    Raises:
        HwpqError: it is missing, damaged, of another version, or holds something else than it says.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.form, self.where = read_form(directory), str(directory / WEIGHTS)
        self.tensors = read_tensors(directory / WEIGHTS)
        check_names(self.form, self.tensors, where=self.where)
        check_layers(self.form, self.tensors)
        for name, tensor in self.tensors.items():
            check_finite(tensor, where=f"{self.where}: {name}")

    def take(self, layer: str) -> PackedLayer:
        """A layer, taken out of `tensors`."""
        kept, positions = (self.tensors.pop(f"{layer}.weight_{part}") for part in ("kept", "positions"))
        four_bits = self.form.four_bits
        scale = self.tensors.pop(f"{layer}.weight_scale", None)
        return PackedLayer(unpack_nibbles(kept) if four_bits else kept, positions, scale, four_bits)

    def rest(self) -> dict[str, Tensor]:
        """What is left once the layers are taken; rounded tables as float32 values."""
        found = dict(self.tensors)
        for table in self.form.tables:
            scale = found.pop(f"{table}.weight_scale")
            found[f"{table}.weight"] = scaled(found[f"{table}.weight"], scale)
        return found


def read_form(directory: str | Path) -> PackedForm:
    """What a packed checkpoint says that it holds.

    Raises:
        HwpqError: there is no such folder or section, or it describes no packed layers.
    """
    file = Path(directory) / "config.json"
    section = read_json(file).get(SECTION)
    if not isinstance(section, dict):
        remedy = "Give the folder of an export of format semi-structured."
        raise HwpqError(f"no section {SECTION}: this is no packed export", where=str(file), remedy=remedy)
    return PackedForm.of(section, where=str(file))


def is_packed(directory: str | Path) -> bool:
    """Whether a directory holds a packed checkpoint."""
    return (Path(directory) / WEIGHTS).is_file()


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
    if GRIDS[quantized.grid].bits <= NIBBLE_BITS:
        kept = pack_nibbles(kept)
    return {
        f"{layer}.weight_scale": quantized.scale.to(scale_dtype),
        f"{layer}.weight_kept": kept,
        f"{layer}.weight_positions": positions,
    }


def write_packed(directory: Path, config: Mapping[str, Any], form: PackedForm, tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `packed.safetensors`.

    Args:
        directory: an existing directory.
        config: of the dense model.
        form: what the tensors are.
        tensors: by name: those of `pack_weight` and `pack_codes`, and the rest of the model.
    """
    form = replace(form, tensors=len(tensors))
    write_json(directory / "config.json", {**config, SECTION: form.section()})
    write_tensors(directory / WEIGHTS, tensors)
