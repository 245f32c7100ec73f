"""What a packed checkpoint says of itself: the section `quantization_config` of its `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from hwpq_pipeline.compression.grids import EMBEDDINGS, GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.packed_linear import WORD

VERSION = 2
METHOD, SECTION = "hwpq", "quantization_config"
WEIGHTS = "packed.safetensors"
AGAIN = "Export the variant again with format semi-structured."
NIBBLE_BITS = 4
#: Codes of 4-bit floats, held as halves, are more than 4 bits wide; no kernel here multiplies them.
PACKABLE = tuple(name for name, grid in GRIDS.items() if not grid.coarsening)
#: Dtypes of weights without a grid, of scales, and of everything that is not packed.
FLOATS = tuple(str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16))
_SHOWN = 40  # characters of a wrong value


@dataclass(frozen=True)
class PackedForm:
    """What a packed checkpoint holds, so that its tensors' shapes and dtypes are known before they are read.

    Attributes:
        layers: names of the packed layers.
        kept_dtype: torch's name of the kept values' dtype; uint8 for codes of at most 4 bits, two a byte.
        scale_dtype: of the scales, None for weights without a grid.
        group_size: inputs that share a scale, None for a scale a row.
        grid: of the codes, None for weights.
        tables: names of the embedding and the head, where they are in codes.
        table_dtype: of their codes.
        tensors: how many the file holds, so that one that is missing is noticed. `write_packed` counts them.
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
            HwpqError: it is of another method or version, or an entry is missing or describes no packed layers.
        """
        if (method := section.get("quant_method")) != METHOD:
            raise HwpqError(f"{SECTION}.quant_method is {method!r}, not {METHOD!r}", where=where, remedy=AGAIN)
        found = section.get("version")
        if type(found) is not int or found != VERSION:
            raise HwpqError(f"packed format {found!r}, and this is the code for {VERSION}", where=where, remedy=AGAIN)
        names = [field.name for field in fields(cls)]
        if lacking := [name for name in names if name not in section]:
            raise HwpqError(f"{SECTION} has no {lacking[0]}", where=where, remedy=AGAIN)
        for name, fits in _FITS.items():
            if not fits(section[name], section):
                what = f"{SECTION}.{name} does not describe packed layers ({shortened(section[name])})"
                raise HwpqError(what, where=where, remedy=AGAIN)
        given = {name: section[name] for name in names}
        return cls(**{**given, "layers": tuple(given["layers"]), "tables": tuple(given["tables"])})

    @property
    def four_bits(self) -> bool:
        """Whether the kept values are codes, two a byte."""
        return self.kept_dtype == "uint8"

    @property
    def parts(self) -> tuple[str, ...]:
        """What each layer's tensors are called behind `weight_`."""
        return ("kept", "positions") if self.scale_dtype is None else ("kept", "positions", "scale")

    @property
    def named(self) -> list[str]:
        """Tensors of the packed layers, and of the tables in codes."""
        layers = [f"{layer}.weight_{part}" for layer in self.layers for part in self.parts]
        return layers + [f"{table}.{part}" for table in self.tables for part in ("weight", "weight_scale")]


def shortened(value: object) -> str:
    """A wrong value as Python writes it, for an error."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _are_names(value: object) -> bool:
    """Names of modules, each once."""
    return (
        isinstance(value, list | tuple)
        and all(isinstance(name, str) and all(name.split(".")) for name in value)
        and len(set(value)) == len(value)
    )


def _kept_dtypes(grid: str | None) -> tuple[str, ...]:
    """What the kept values of a grid may be."""
    if grid is None:
        return FLOATS
    return ("uint8" if GRIDS[grid].bits <= NIBBLE_BITS else GRIDS[grid].code_dtype,)


def _fits_group(value: object, section: Mapping[str, Any]) -> bool:
    if value is None:
        return True
    sizes = () if section["grid"] is None else GRIDS[section["grid"]].group_sizes
    return type(value) is int and value in sizes and value % WORD == 0


_TABLE_DTYPES = tuple(GRIDS[name].code_dtype for name in EMBEDDINGS.values() if name is not None)
#: By entry: whether a value may stand there, beside the others. What others are held against comes before them.
_FITS: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "grid": lambda value, _: value is None or value in PACKABLE,
    "layers": lambda value, _: _are_names(value) and len(value) > 0,
    "kept_dtype": lambda value, section: value in _kept_dtypes(section["grid"]),
    "scale_dtype": lambda value, section: value is None if section["grid"] is None else value in FLOATS,
    "group_size": _fits_group,
    "tables": lambda value, section: _are_names(value) and not set(value) & set(section["layers"]),
    "table_dtype": lambda value, section: value in _TABLE_DTYPES if section["tables"] else value is None,
    "tensors": lambda value, _: type(value) is int and value > 0,
}
