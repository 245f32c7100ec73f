"""The packed 2:4 checkpoint: half of the weights are missing, on disk and in memory. It is written and read here.

For each 2:4 layer, `packed.safetensors` holds (`compression.packing` has the bits):

    codes          tensors                                                           of the dense 2:4 layer's bytes
    none           weight_kept (out, in/2) in the dense model's dtype                9/16 of 16-bit weights
    8 bits         weight_kept (out, in/2) float8_e4m3fn or int8, and weight_scale   5/8
    at most 4      weight_kept (out, in/4) uint8, two codes a byte, and weight_scale 3/4 of 4-bit codes
    all of these   weight_positions (out, ⌈in/8⌉) uint8

Scales are (out, groups). Other tensors are those of the dense model; a rounded embedding or head is `weight` in codes
and `weight_scale` (out, 1). `quantization_config` in `config.json` says what the file holds (`PackedForm`), with
`quant_method: hwpq`, by which vLLM finds the plugin. The weights are not in `model.safetensors`, so a loader that does
not know the format finds no weights. Otherwise it would find a model that lacks half of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.codes import Quantized, scaled
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.packing import pack_nibbles, pack_two_of_four, unpack_nibbles
from hwpq_pipeline.errors import HwpqError

VERSION = 2
METHOD, SECTION = "hwpq", "quantization_config"
WEIGHTS = "packed.safetensors"
AGAIN = "Export the variant again with format semi-structured."
_NIBBLE_BITS = 4


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


@dataclass(frozen=True)
class PackedForm:
    """What a packed checkpoint holds, so that its tensors' shapes and dtypes are known before they are read.

    Attributes:
        layers: names of the packed layers.
        kept_dtype: torch's name of the kept values' dtype; uint8 for codes of at most 4 bits, two a byte.
        scale_dtype: of the scales, None for weights without a grid.
        group_size: inputs that share a scale, None for a scale a row.
        grid: of the codes, None for weights; for people.
        tables: names of the embedding and the head, where they are in codes.
        table_dtype: of their codes.
        tensors: how many the file holds, so that one that is missing is noticed; 0 if it is not known.
    """

    layers: tuple[str, ...]
    kept_dtype: str
    scale_dtype: str | None = None
    group_size: int | None = None
    grid: str | None = None
    tables: tuple[str, ...] = ()
    table_dtype: str | None = None
    tensors: int = 0

    def section(self) -> dict[str, Any]:
        """The section of `config.json`."""
        return {"quant_method": METHOD, "version": VERSION, **asdict(self)}

    @classmethod
    def of(cls, section: Mapping[str, Any], *, where: str) -> PackedForm:
        """Of a section of `config.json`.

        Raises:
            HwpqError: it is of another version, or no such section.
        """
        if (found := section.get("version")) != VERSION:
            raise HwpqError(f"packed format {found!r}, and this is the code for {VERSION}", where=where, remedy=AGAIN)
        given = {name: section.get(name) for name in cls.__dataclass_fields__}
        wrong = [name for name, value in given.items() if not _is_such(name, value)]
        if wrong:
            raise HwpqError(f"{SECTION}.{wrong[0]} does not describe packed layers", where=where, remedy=AGAIN)
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
        return cls(**values)

    @property
    def four_bits(self) -> bool:
        """Whether the kept values are codes, two a byte."""
        return self.kept_dtype == "uint8"


def _is_such(name: str, value: object) -> bool:
    """Whether a value in JSON may be the attribute of a `PackedForm`."""
    if name in ("layers", "tables"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if value is None:
        return name not in ("kept_dtype", "tensors")
    if name in ("group_size", "tensors"):
        return type(value) is int and value >= (name == "group_size")
    return isinstance(value, str) and (
        not name.endswith("_dtype") or isinstance(getattr(torch, value, None), torch.dtype)
    )


class PackedCheckpoint:
    """A packed checkpoint, read whole.

    Args:
        directory: where it is.

    Attributes:
        form: what it holds.
        tensors: all tensors by name.

    Raises:
        HwpqError: it is missing, damaged, or of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.form = PackedForm.of(_section(directory) or {}, where=f"{directory}/config.json")
        self.tensors = read_tensors(directory / WEIGHTS)

    def take(self, layer: str) -> PackedLayer:
        """A layer, taken out of `tensors`.

        Raises:
            HwpqError: its values, positions or scales are missing.
        """
        kept, positions, scale = (
            self.tensors.pop(f"{layer}.weight_{part}", None) for part in ("kept", "positions", "scale")
        )
        if kept is None or positions is None or (scale is None and self.form.scale_dtype is not None):
            raise HwpqError("its packed tensors are missing", where=layer, remedy=AGAIN)
        four_bits = kept.dtype == torch.uint8
        return PackedLayer(unpack_nibbles(kept) if four_bits else kept, positions, scale, four_bits)

    def rest(self) -> dict[str, Tensor]:
        """What is left once the layers are taken; rounded tables as float32 values.

        Raises:
            HwpqError: a rounded table's codes or scales are missing.
        """
        found = dict(self.tensors)
        for table in self.form.tables:
            if missing := {f"{table}.weight", f"{table}.weight_scale"} - set(found):
                raise HwpqError(f"no tensor {min(missing)}", where=table, remedy=AGAIN)
        for name in [name for name in found if name.endswith(".weight_scale")]:
            weight, scale = name.removesuffix("_scale"), found.pop(name)
            found[weight] = scaled(found[weight], scale)
        return found


def is_packed(directory: str | Path) -> bool:
    """Whether a directory holds a packed checkpoint."""
    return (Path(directory) / WEIGHTS).is_file()


def _section(directory: Path) -> dict[str, Any] | None:
    found = read_json(directory / "config.json").get(SECTION)
    return found if isinstance(found, dict) else None


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
