"""Packing: 2:4 weights without their zeros, and 4-bit codes two a byte.

**2:4.** Of every aligned four inputs, two values and the columns where they stood:

    kept       (out, in / 2)      the group's two values, in the order of their columns
    positions  (out, ⌈in / 8⌉)    uint8: bits 4g … 4g + 3 of a row (lowest bits first) belong to its group g of four.
                                  The lower two are the column of its first value, the upper two of its second

That is 2 · 16 + 4 bits instead of 4 · 16 for a group of 16-bit numbers (9/16), 2 · 8 + 4 instead of 4 · 8 for 8-bit
ones (5/8), and 2 · 4 + 4 instead of 4 · 4 for 4-bit ones (3/4). A group with fewer than two nonzero weights is filled
up with zeros of its lowest free columns, so the same weight always packs to the same bytes.

**Codes.** Codes −8 … 7 are stored with an offset of 8, the first of two in the lower half of a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.compression.structured import GROUP, KEPT, check_two_of_four
from hwpq_pipeline.errors import HwpqError


def pack_two_of_four(weight: Tensor, *, where: str = "pack_two_of_four") -> tuple[Tensor, Tensor]:
    """Leave out the zeros of a 2:4 weight.

    Args:
        weight: shape (out, in), any dtype, float8 and int8 codes too; in divisible by 4.
        where: the layer's name, for errors.

    Returns:
        `(kept, positions)` as above; kept has the weight's dtype.

    Raises:
        HwpqError: a group of four has more than two nonzero weights, or the columns are not a multiple of 4.
    """
    plain = weight.float() if weight.is_floating_point() else weight
    check_two_of_four(plain, where)
    rows, columns = weight.shape
    column = torch.arange(GROUP, dtype=torch.int16)
    order = column + GROUP * (plain.view(rows, -1, GROUP) == 0).to(torch.int16)  # nonzero weights come first
    first = order.topk(KEPT, dim=2, largest=False).indices.sort(dim=2).values
    bits = _as_bits(weight).view(rows, -1, GROUP)
    kept = bits.gather(2, first).view(rows, columns // 2).view(weight.dtype)
    nibbles = (first[..., 0] | first[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return kept, nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_two_of_four(kept: Tensor, positions: Tensor, *, where: str = "unpack_two_of_four") -> Tensor:
    """The inverse of `pack_two_of_four`: (out, in), zeros in their places.

    Raises:
        HwpqError: shapes that do not belong together, or a group that names one column twice.
    """
    rows, half = kept.shape
    groups = half // KEPT
    if positions.dtype != torch.uint8 or tuple(positions.shape) != (rows, (groups + 1) // 2) or half % KEPT:
        raise HwpqError(
            f"positions {positions.dtype} {tuple(positions.shape)} do not belong to values {tuple(kept.shape)}",
            where=where,
            remedy="The packed file is damaged: export the variant again.",
        )
    place = _places(positions, groups)
    _check_places(place, where)
    bits = _as_bits(kept).view(rows, groups, KEPT)
    whole = bits.new_zeros(rows, groups, GROUP).scatter_(2, place, bits)
    return whole.view(rows, groups * GROUP).view(kept.dtype)


def check_positions(positions: Tensor, half: int, *, where: str) -> None:
    """That positions (out, ⌈in / 8⌉) of ``half`` = in / 2 kept values a row are such.

    Raises:
        HwpqError: a group that names one column twice.
    """
    _check_places(_places(positions, half // KEPT), where)


def _places(positions: Tensor, groups: int) -> Tensor:
    """(out, groups, 2) int64: the columns of a group's values."""
    nibbles = torch.stack([positions & 15, positions >> 4], dim=2).view(positions.shape[0], -1)[:, :groups]
    return torch.stack([nibbles & 3, nibbles >> 2], dim=2).long()


def _check_places(places: Tensor, where: str) -> None:
    if bool((places[..., 0] == places[..., 1]).any()):
        raise HwpqError(
            "a group of four names one column twice", where=where, remedy="The packed file is damaged: export it again."
        )


def _as_bits(values: Tensor) -> Tensor:
    """The same bytes as integers, which every tensor operation takes."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    return values.contiguous().view(width)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes (−8 … 7) a byte: (out, n) int8 to (out, n / 2) uint8; n is even."""
    shifted = (codes.to(torch.int16) + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: (out, n / 2) uint8 to (out, n) int8."""
    both = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)
    return (both.to(torch.int16) - 8).to(torch.int8)
