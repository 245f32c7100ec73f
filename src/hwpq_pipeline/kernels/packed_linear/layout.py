"""The layout of a packed 2:4 weight in memory, and back (see the package).

    values     (blocks, words, bytes)      of eight rows and 32 inputs, m = 0 … 15 the kept values of a row in order:
                   floats                  (16 m, 8 rows), each in its bytes
                   int8                    (4 k, 8 rows, 4 j), m = 4k + j: the vector k is read at once
                   int4                    (2 k', 8 rows, 4 j): the codes + 8 of k = 2k' and 2k' + 1 in a byte's halves
    places     (blocks, words, 8 rows, 4)  two bits each: the place of a kept value in its four
                   floats                  as in the file: bits 2m of a row's 32
                   integers                bits 2k of byte j, so that a shift and a mask give the vector k's places
    scale      (blocks, scale groups, 8)

Padded rows and inputs have values of zero. A code of zero in 4 bits is 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.kernels.inference import FLOATS

ROWS, WORD = 8, 32
KEPT = WORD // 2
#: By number, which the op is given.
KINDS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
KINDS_OF_INTEGERS = ("int8", "int4")
#: Bytes of a word of eight rows, by kind.
_BYTES = tuple(ROWS * KEPT * width // 8 for width in (32, 16, 16, 8, 8, 4))
_BYTE, _FLOAT = torch.uint8, torch.float32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _blocks(rows: Tensor, width: int) -> Tensor:
    """(blocks, 8, words, width) of (out, words · width), padded by zeros to whole blocks and words."""
    words = -(-rows.shape[1] // width)
    padded = torch.nn.functional.pad(rows, (0, words * width - rows.shape[1], 0, -rows.shape[0] % ROWS))
    return padded.view(-1, ROWS, words, width)


def values_of(kept: Tensor, kind: str) -> Tensor:
    """(blocks, words, bytes) uint8 of kept values (out, in / 2)."""
    blocks = _blocks(kept.contiguous().view(_INTEGERS[kept.dtype.itemsize]), KEPT)
    if kind not in KINDS_OF_INTEGERS:
        found = blocks.permute(0, 2, 3, 1)
    else:
        found = blocks.unflatten(3, (4, 4)).permute(0, 2, 3, 1, 4)
        if kind == "int4":
            shifted = found + 8 & 15  # of bytes: −8 is 248
            found = shifted[:, :, ::2] | shifted[:, :, 1::2] << 4
    return found.contiguous().view(torch.uint8).flatten(2)


def kept_of(values: Tensor, kind: str) -> Tensor:
    """The inverse of `values_of`, with the padding: (8 · blocks, 16 · words), dtype by kind."""
    blocks, words = values.shape[:2]
    if kind in KINDS_OF_INTEGERS:
        found = values.view(blocks, words, -1, ROWS, 4)
        if kind == "int4":
            found = torch.stack([found & 15, found >> 4], dim=3).flatten(2, 3) + 248  # minus 8, of bytes
        return found.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, -1).view(torch.int8)
    dtype = getattr(torch, kind)
    bits = values.view(_INTEGERS[dtype.itemsize]).view(blocks, words, KEPT, ROWS)
    return bits.permute(0, 3, 1, 2).reshape(blocks * ROWS, -1).view(dtype)


def places_of(positions: Tensor, kind: str) -> Tensor:
    """(blocks, words, 32) uint8 of positions (out, ⌈in / 8⌉)."""
    blocks = _blocks(positions, 4)
    if kind in KINDS_OF_INTEGERS:
        blocks = _transposed(blocks)
    return blocks.permute(0, 2, 1, 3).contiguous().flatten(2)


def positions_of(places: Tensor, kind: str) -> Tensor:
    """The inverse of `places_of`, with the padding: (8 · blocks, 4 · words) uint8."""
    blocks, words = places.shape[:2]
    found = places.view(blocks, words, ROWS, 4)
    if kind in KINDS_OF_INTEGERS:
        found = _transposed(found)
    return found.permute(0, 2, 1, 3).reshape(blocks * ROWS, words * 4)


def _transposed(places: Tensor) -> Tensor:
    """Bits 2j of byte k become bits 2k of byte j, in the last dimension's four bytes."""
    single = torch.stack([places >> 2 * j & 3 for j in range(4)], dim=-2)  # (…, j, k)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    return (single << shifts).sum(-1, dtype=torch.uint8)


def scale_of(scale: Tensor) -> Tensor:
    """(blocks, scale groups, 8) float32 of scales (out, scale groups)."""
    padded = torch.nn.functional.pad(scale.float(), (0, 0, 0, -scale.shape[0] % ROWS))
    return padded.view(-1, ROWS, scale.shape[1]).transpose(1, 2).contiguous()


def check_weight(values: Tensor, places: Tensor, scale: Tensor, kind: int, rows: int) -> int:
    """Refuse a weight that a kernel would read beyond its end.

    Args:
        values, places, scale: in the layout.
        kind: number of its kind.
        rows: that it stands for.

    Returns:
        Words of inputs that it takes.

    Raises:
        ValueError: tensors that do not belong together.
    """
    if not (values.dtype is _BYTE and places.dtype is _BYTE and scale.dtype is _FLOAT):
        raise ValueError("packed_linear: values and places are bytes, scales float32")
    (blocks, words, width), (scaled, groups, lanes) = _three(places), _three(scale)
    if (
        not 0 <= kind < len(KINDS)
        or (width, scaled, lanes) != (WORD, blocks, ROWS)
        or _three(values) != (blocks, words, _BYTES[kind])
        or not groups
        or words % groups
        or -(-rows // ROWS) != blocks
    ):
        raise ValueError("packed_linear: values, places, scales, kind and rows do not belong together")
    return words


def _three(tensor: Tensor) -> tuple[int, ...]:
    """Its three dimensions; zeros if it has others."""
    shape = tensor.shape
    return (0, 0, 0) if len(shape) != 3 else shape


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuse a bias that is not one float for each output.

    Raises:
        ValueError: it is another.
    """
    if bias.shape != (rows,) or bias.dtype not in FLOATS:
        raise ValueError(f"packed_linear: a bias {bias.dtype} {tuple(bias.shape)} for {rows} outputs")


def fake(x: Tensor, *arguments: Any) -> Tensor:
    """What the ops give, without values: `arguments` are the weight's three tensors, bias, kind and rows, in order."""
    rows = arguments[5]
    return x.new_empty((*x.shape[:-1], rows))
