"""Grids (number formats): the numbers that a compressed weight may take, `w ≈ scale · code`.

    name       codes                      scale                                           stored as
    fp8_e4m3   E4M3, |code| ≤ 448         absmax/448 per output channel                   float8_e4m3fn
    fp8_e5m2   E5M2 ∩ E4M3, |code| ≤ 448  a power of two per output channel               float8_e4m3fn
    int8       −127 … 127                 absmax/127 per channel or group                 int8
    int4       −8 … 7                     least squared error, per group or channel       int8
    int3       −4 … 3                     least squared error, per group or channel       int8
    int2       −2 … 1                     least squared error, per group or channel       int8
    nvfp4      0 ±1 ±2 ±3 ±4 ±6 ±8 ±12    E4M3 · 2⁻ᵏ, least squared error, per 16 columns int8
    mxfp4      the same                   2ᵉ, least squared error, per 32 columns         int8

E5M2 is the paper's grid, and no serving engine reads it. It has one exponent bit more and one mantissa bit less than
E4M3. Within E4M3's range an E5M2 value is an E4M3 value, down to 2⁻⁷. Below that, E4M3 becomes subnormal with steps of
2⁻⁹, and there 1, 2 and 3 steps are E5M2 values too. A power-of-two scale lifts the channel's largest weight to at most
448. So the weights are rounded to E5M2 and stored as E4M3, exactly.

NVFP4 and MXFP4 are what current GPUs multiply. Their codes are 4-bit floats (E2M1), held here in halves, so that they
are integers: `±12` stands for the float ±6. NVFP4 has scales of 8-bit floats (E4M3), and a scale for the whole tensor.
Ours is a power of two, `2⁻ᵏ`. So every scale stays a number of 4 significant bits, and the weights are bfloat16
numbers. Layers that read one input share it, as engines that fuse them want. MXFP4 has scales that are powers of two.

At 2 to 4 bits the scale that fits the largest weight wastes codes, so the scale is searched (`scales.search_scale`).

A grid's facts are here and nowhere else. What an engine calls a grid is in that engine's module of `export`; its test
holds each format complete: it stores a grid, or it refuses the grid by name. The arithmetic is in `codes`. This module
imports no torch, because the parameters and the command line read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hwpq_pipeline.errors import HwpqError


@dataclass(frozen=True)
class Grid:
    """A set of codes, and how scales are chosen for it.

    Attributes:
        name: what parameters and recipes call it.
        bits: that a code takes.
        low, high: the smallest and the largest code.
        code_dtype: torch's name of the dtype that holds a code.
        coarsening: whether the codes are those of E2M1 in halves, and not all integers from `low` to `high`.
        stored_as: what the scales are stored as: numbers of the dense `model`'s dtype, of `e4m3` times a power of two
            for the tensor, or powers of two (`e8m0`).
        embeds_as: what `quantization.embeddings` calls the grid; None if embeddings do not take it.
        scale: how the scale is chosen: `absmax` (the largest weight takes the largest code), `power_of_two` (the same,
            rounded up to a power of two), `searched` (least squared error).
        words: codes and scales in words, for the model card.
        activations: the number format that engines round activations to before these layers; None if they do not.
        group_sizes: columns that may share a scale; a variant chooses one. Empty: one scale per output channel.
        through: torch's name of a coarser dtype that codes are rounded to first.
        descends: whether a variant may round by coordinate descent. At 8 bits rounding to nearest loses almost nothing.
    """

    name: str
    bits: int
    low: float
    high: float
    code_dtype: str
    scale: Literal["absmax", "power_of_two", "searched"]
    words: str
    activations: str | None = None
    group_sizes: tuple[int, ...] = ()
    through: str | None = None
    descends: bool = False
    coarsening: bool = False
    stored_as: Literal["model", "e4m3", "e8m0"] = "model"
    embeds_as: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether codes are floats."""
        return self.code_dtype.startswith("float")

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale: two in the dtype of most models."""
        return 2 if self.stored_as == "model" else 1

    def bytes_of(self, rows: int, columns: int, group_size: int | None, scale_bytes: int | None = None) -> int:
        """Bytes of a layer's codes and scales as engines store them: codes of fewer than 8 bits in words of 32.

        Args:
            rows, columns: of the weight.
            group_size: columns that share a scale; None for one scale a row.
            scale_bytes: of a scale; None for those of most models.
        """
        words = -(-columns * self.bits // _WORD) * _WORD // 8
        scales = columns // group_size if group_size else 1
        return rows * ((columns if self.bits == 8 else words) + scales * (scale_bytes or self.scale_bytes))


_GROUPS = (32, 64, 128)
_WORD = 32  # bits

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid(
            "fp8_e4m3", 8, -448.0, 448.0, "float8_e4m3fn", "absmax",
            "8-bit floating point (E4M3) weights, one scale per output channel", activations="FP8",
            embeds_as="fp8",
        ),
        Grid(
            "fp8_e5m2", 8, -448.0, 448.0, "float8_e4m3fn", "power_of_two",
            "8-bit floating point (E5M2) weights with a power-of-two scale per output channel, stored as E4M3, which "
            "holds them exactly", activations="FP8", through="float8_e5m2",
        ),
        Grid(
            "int8", 8, -127.0, 127.0, "int8", "absmax",
            "8-bit integer weights, one scale per output channel", activations="INT8", embeds_as="int8",
        ),
        Grid(
            "int4", 4, -8.0, 7.0, "int8", "searched",
            "4-bit integer weights, packed, one scale per group of columns", group_sizes=_GROUPS, descends=True,
        ),
        Grid(
            "int3", 3, -4.0, 3.0, "int8", "searched",
            "3-bit integer weights, packed, one scale per group of columns", group_sizes=_GROUPS, descends=True,
        ),
        Grid(
            "int2", 2, -2.0, 1.0, "int8", "searched",
            "2-bit integer weights, packed, one scale per group of columns", group_sizes=_GROUPS, descends=True,
        ),
        Grid(
            "nvfp4", 4, -12.0, 12.0, "int8", "searched",
            "4-bit floating point (NVFP4) weights, an 8-bit scale per 16 columns", group_sizes=(16,), descends=True,
            coarsening=True, stored_as="e4m3",
        ),
        Grid(
            "mxfp4", 4, -12.0, 12.0, "int8", "searched",
            "4-bit floating point (MXFP4) weights, a power of two as scale per 32 columns", group_sizes=(32,),
            descends=True, coarsening=True, stored_as="e8m0",
        ),
    )
}  # fmt: skip

#: Grids for embeddings and head, by the word that variants use; None leaves them as they are.
EMBEDDINGS: dict[str, str | None] = {"none": None} | {
    grid.embeds_as: grid.name for grid in GRIDS.values() if grid.embeds_as is not None
}


def find_grid(name: str, where: str) -> Grid:
    """The grid of that name.

    Raises:
        HwpqError: there is none; the remedy lists the grids.
    """
    if name not in GRIDS:
        raise HwpqError(f"unknown grid {name!r}", where=where, remedy=f"Choose one of {', '.join(GRIDS)}.")
    return GRIDS[name]


def check_group(columns: int, grid: Grid, group_size: int | None, where: str) -> int:
    """The number of columns that share a scale.

    Args:
        columns: of the weight.
        grid: its grid.
        group_size: wanted; None for one scale a row.
        where: the layer's name, for errors.

    Raises:
        HwpqError: the group size does not divide `columns` (the remedy names those of the grid that do), or codes are
            floats.
    """
    if group_size is None:
        return columns
    if grid.is_float:
        raise HwpqError(
            f"{grid.name} takes one scale per output channel, not groups of {group_size}",
            where=where,
            remedy="Leave the group size out.",
        )
    if group_size < 1 or columns % group_size:
        fitting = [size for size in grid.group_sizes if columns % size == 0]
        choice = (
            f"Set the group size to {' or '.join(map(str, fitting))}, or " if fitting else "Choose another grid, or "
        )
        raise HwpqError(
            f"{columns} columns do not divide into groups of {group_size}",
            where=where,
            remedy=f"{choice}leave this layer as it is (`ignore` in the variant).",
        )
    return group_size
