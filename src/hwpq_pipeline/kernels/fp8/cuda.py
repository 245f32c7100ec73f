"""The CUDA kernel, in Triton. Each program reads one row twice: for its largest weight, then for the codes.

The conversion is written out in integers, so that GPUs without FP8 units make the same checkpoints. Divisions round as
IEEE says. Addresses are 64-bit: a row's start is its number times the stride in int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hwpq_pipeline.kernels.fp8.reference import E4M3_MAX
from hwpq_pipeline.kernels.triton_parts import STORED, as_stored

BLOCK = 1024

_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
#: 2¹⁴, where a float32's last bit is E4M3's smallest step, 2⁻⁹.
_SUBNORMAL = tl.constexpr(16384.0)


@triton.jit
def _e4m3(x):
    """The bits of the nearest E4M3, halves to even; |x| ≤ 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Normal numbers: 20 mantissa bits go, the exponent's bias falls from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) + _SUBNORMAL).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, normal)  # below 2⁻⁶
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantize(weight, stride, columns, codes, scales, smallest, BLOCK: tl.constexpr, STORED: tl.constexpr):
    """One row; `STORED` is the scale's type, `smallest` its least normal number."""
    number = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        cols = first + place
        w = tl.load(weight + number * stride + cols, mask=cols < columns, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(w))
    absmax = tl.max(top, 0)
    scale = tl.where(absmax > 0, tl.maximum(tl.div_rn(absmax, _MAX), _TINY), 1.0)
    stored = as_stored(scale, STORED)
    scale = tl.where((stored > 0) & (stored < float("inf")), stored, smallest)
    tl.store(scales + number, scale)
    divisor = tl.zeros((BLOCK,), tl.float32) + scale
    for first in range(0, columns, BLOCK):
        cols = first + place
        w = tl.load(weight + number * stride + cols, mask=cols < columns, other=0.0).to(tl.float32)
        ratio = tl.minimum(tl.maximum(tl.div_rn(w, divisor), -_MAX), _MAX)
        tl.store(codes + number * columns + cols, _e4m3(ratio), mask=cols < columns)


def quantize(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize`."""
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.to(torch.float32)
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=weight.device)
    _quantize[(rows,)](
        weight, weight.stride(0) if rows > 1 else columns, columns, codes, scales,
        torch.finfo(scale_dtype).tiny, BLOCK=BLOCK, STORED=STORED[scale_dtype], num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales
