"""Weights as GGUF stores them: float16, or blocks of 32 neighbouring weights with a float16 scale each (see `gguf`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.compression.codes import Quantized, dequantize
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError

from .llama import USE_ANOTHER

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK, "MXFP4": 1 + BLOCK // 2}
#: MXFP4's numbers of codes, which are halves, in order: eight of zero and above, then eight with a sign.
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
_MX_BIAS = 128
_FLOAT16_MAX = torch.finfo(torch.float16).max
Array = np.ndarray[Any, Any]


def interleaved(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of queries or keys from halves (j, j + half) to neighbours (2j, 2j + 1), head by head."""
    if heads is None:
        return rows
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def as_float16(weight: Tensor, where: str) -> Array:
    """A weight in float16.

    Raises:
        HwpqError: a value is too large for it.
    """
    if float(weight.abs().max()) > _FLOAT16_MAX:
        raise HwpqError("a weight is too large for float16", where=where, remedy=USE_ANOTHER)
    array: Array = weight.to(torch.float16).numpy()
    return array


def as_blocks(quantized: Quantized, kind: str, where: str) -> Array:
    """A compressed layer as GGUF stores it: float16 (out, in), or bytes (out, in / 32 · bytes a block).

    Raises:
        HwpqError: a scale or weight is too large for float16.
    """
    codes, scale = quantized.codes, quantized.scale
    rows, columns = codes.shape
    if kind == "F16":
        return as_float16(dequantize(quantized), where)
    if GRIDS[quantized.grid].is_float:
        return _rounded(dequantize(quantized), where)
    spread = scale.repeat_interleave(columns // BLOCK // scale.shape[1], dim=1)
    values = codes.view(rows, columns // BLOCK, BLOCK).numpy()
    if kind == "MXFP4":
        numbers = np.searchsorted(_HALVES, np.abs(values)) | (values < 0).astype(np.int64) << 3
        exponents = (torch.log2(scale) + _MX_BIAS).to(torch.uint8).numpy()[..., None]
        return np.concatenate([exponents, _nibbles(numbers.astype(np.uint8))], axis=2).reshape(rows, -1)
    if kind == "Q4_0":
        values = _nibbles((values.astype(np.int16) + 8).astype(np.uint8))
    return _with_scales(values.view(np.uint8), spread, where)


def _nibbles(values: Array) -> Array:
    """Two of a block's numbers a byte: columns j and j + 16, the first in the lower half."""
    packed: Array = values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4
    return packed


def _rounded(weight: Tensor, where: str) -> Array:
    """Float weights as Q8_0: the block's largest becomes ±127."""
    rows, columns = weight.shape
    blocks = weight.view(rows, columns // BLOCK, BLOCK)
    scale = (blocks.abs().amax(2) / 127).to(torch.float16).float()  # codes are chosen for the scale as stored
    codes = torch.where(scale[..., None] > 0, blocks / scale[..., None], 0.0).round_().clamp_(-127, 127)
    return _with_scales(codes.to(torch.int8).numpy().view(np.uint8), scale, where)


def _with_scales(values: Array, scale: Tensor, where: str) -> Array:
    """Each block's scale before its codes, (out, bytes)."""
    halves = as_float16(scale, where)[..., None].view(np.uint8)
    return np.concatenate([halves, values], axis=2).reshape(values.shape[0], -1)
