"""Linear layers in the forms that a GPU multiplies: dense, FP8, 2:4, and both together.

dense_bf16    x Wᵀ
fp8           weights and activations E4M3: a scale a row of W, a scale a token of x, found as the layer runs
sparse_bf16   2:4 through torch's semi-structured tensors, what a user of torch would write
sparse_int8   2:4 and INT8, sparse_fp8 2:4 and E4M3: the product alone, by cuSPARSELt, activations rounded as the
              layer runs and scaled after
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwpq_pipeline.kernels import fp8

KINDS = ("dense_bf16", "fp8", "sparse_bf16", "sparse_fp8", "sparse_int8")


def prune(weight: Tensor) -> Tensor:
    """To 2:4 by magnitude: the pattern is what matters for speed."""
    groups = weight.unflatten(1, (-1, 4))
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, dim=2).indices, True)
    return (groups * keep).flatten(1)


def rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, in) E4M3 and (tokens, 1) float32 scales, in torch's own operations, which `torch.compile` fuses."""
    scale = (x.abs().amax(1, keepdim=True).float() / 448).clamp_min(1e-12)
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, in) int8 and (tokens, 1) float32 scales."""
    scale = (x.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-12)
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


class Fp8(nn.Module):
    """`y = scale_x · scale_w · (codes_x codes_wᵀ)`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = fp8.quantize(weight)
        self.round = rows_to_fp8
        self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) bfloat16 → (…, out) bfloat16."""
        codes, scale = self.round(x.flatten(0, -2))
        y = torch._scaled_mm(codes, self.codes.T, scale, self.scale, out_dtype=torch.bfloat16)  # noqa: SLF001
        return y.unflatten(0, x.shape[:-1])


class SparseLow(nn.Module):
    """2:4 with INT8 or E4M3, by cuSPARSELt's product `codes_w codes_xᵀ`, scaled after it."""

    def __init__(self, weight: Tensor, integers: bool) -> None:
        super().__init__()
        self.round, self.finish = rows_to_int8 if integers else rows_to_fp8, scaled
        codes, scale = self.round(prune(weight))
        self.packed, self.scale = nn.Buffer(torch._cslt_compress(codes)), nn.Buffer(scale.T.contiguous())  # noqa: SLF001

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) bfloat16 → (…, out) bfloat16; tokens are padded to 16."""
        flat = x.flatten(0, -2)
        tokens = flat.shape[0]
        codes, scale = self.round(functional.pad(flat, (0, 0, 0, -tokens % 16)))
        product = torch._cslt_sparse_mm(self.packed, codes.T, out_dtype=torch.bfloat16, transpose_result=True)  # noqa: SLF001
        return self.finish(product, scale, self.scale)[:tokens].unflatten(0, x.shape[:-1])


def scaled(product: Tensor, of_tokens: Tensor, of_rows: Tensor) -> Tensor:
    """(tokens, out) bfloat16 times both scales."""
    return (product.float() * of_tokens * of_rows).bfloat16()


class SparseBf16(nn.Module):
    """2:4 as torch offers it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(prune(weight)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) bfloat16 → (…, out) bfloat16."""
        return functional.linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Dense(nn.Module):
    """As it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return functional.linear(x, self.weight)


MAKERS: dict[str, Callable[[Tensor], Any]] = {
    "dense_bf16": Dense,
    "fp8": Fp8,
    "sparse_bf16": SparseBf16,
    "sparse_fp8": lambda weight: SparseLow(weight, integers=False),
    "sparse_int8": lambda weight: SparseLow(weight, integers=True),
}


def expected(kind: str, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer should give, in float32."""
    return x.float() @ (prune(weight) if kind.startswith("sparse") else weight).float().T
