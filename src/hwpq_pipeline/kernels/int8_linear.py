"""A dense weight in INT8 codes with a scale a row, on the CPU: an embedding, or a head.

    y = x (s ∘ C)ᵀ        rows[i] = s[i] · C[i]

A head is the largest layer of a small model, and decoding a token reads all of it: in codes a quarter of float32. The
product is torch's own kernel for INT8 weights, in bfloat16: it is slow in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.inference import check_input

#: torch's kernel reads whole vectors of inputs, past the end of others: with 100 inputs it crashes.
WORD = 32


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(…, out) of (…, in), with the dtype of `x`.

    Args:
        x: any float dtype; it is rounded to bfloat16.
        codes: (out, in) int8.
        scale: (out,).

    Raises:
        HwpqError: inputs that are no floats, of another width, or that want gradients.
    """
    check_input(x, codes.shape[1], where="int8_linear")
    if x.shape[-1] % WORD:
        return (x.float() @ (codes.float() * scale[:, None].float()).T).to(x.dtype)
    given = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    if scale.dtype != torch.bfloat16:  # the kernel takes no other; its rounding would be one too many
        found = int8_linear(given, codes, torch.ones_like(scale, dtype=torch.bfloat16)).float() * scale.float()
        return found.view(*x.shape[:-1], codes.shape[0]).to(x.dtype)
    found = torch._weight_int8pack_mm(given, codes, scale)  # noqa: SLF001 (torch has no other door to it)
    return found.view(*x.shape[:-1], codes.shape[0]).to(x.dtype)


def int8_rows(ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, in) rows of ids (…).

    Args:
        ids: which.
        codes: (rows, in) int8.
        scale: (rows,).
        dtype: of the result.
    """
    found = torch.nn.functional.embedding(ids, codes)
    return (found.float() * scale[ids][..., None].float()).to(dtype)
