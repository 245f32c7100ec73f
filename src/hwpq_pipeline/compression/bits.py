"""Keep-masks with one bit a weight: packed along the inputs, in little bit order.

Bit `k` of byte `b` of a row is column `8 b + k`; 1 keeps the weight. The last byte of a row is padded with zeros, so
a row of `in` columns takes ⌈in / 8⌉ bytes and every row starts at a byte. This is `numpy.packbits(…,
bitorder="little")`: numpy alone can open the masks on disk.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError


def packed_columns(columns: int) -> int:
    """Bytes that a row of `columns` keep-bits takes."""
    return (columns + 7) // 8


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a boolean mask.

    Args:
        keep: bool, shape (out, in); True keeps the weight.

    Returns:
        uint8, shape (out, ceil(in / 8)), on the same device.

    Raises:
        HwpqError: the mask is not a two-dimensional bool tensor.
    """
    if keep.dtype != torch.bool or keep.dim() != 2:
        raise HwpqError(
            f"a mask of dtype {keep.dtype} and shape {tuple(keep.shape)} cannot be packed",
            where="pack_bits",
            remedy="Give a bool tensor of shape (out_features, in_features)",
        )
    if keep.device.type != "cpu":
        whole = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8)).unflatten(1, (-1, 8))
        return (whole << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(2, dtype=torch.uint8)
    packed = np.packbits(keep.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8, shape (out, ceil(columns / 8)).
        columns: the number of inputs, in.

    Returns:
        bool, shape (out, columns), on the same device.

    Raises:
        HwpqError: the packed width does not fit the number of columns.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_columns(columns):
        raise HwpqError(
            f"packed bits of dtype {packed.dtype} and shape {tuple(packed.shape)} do not hold {columns} columns",
            where="unpack_bits",
            remedy=f"Expected uint8 with {packed_columns(columns)} bytes a row; recompute the selection",
        )
    if packed.device.type != "cpu":
        bits_of = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
        return (bits_of & 1).bool().flatten(1)[:, :columns].contiguous()
    bits = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))
