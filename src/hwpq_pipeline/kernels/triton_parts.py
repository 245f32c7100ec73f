"""What CUDA kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Added and taken away again, it rounds a float32 below 2²² to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
#: Triton's names of the types that scales are stored in.
STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def with_mantissa(value, DROPPED: tl.constexpr):
    """The nearest float32 whose last `DROPPED` mantissa bits are zero, halves to even."""
    if DROPPED > 0:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
        result = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
    else:
        result = value
    return result


@triton.jit
def as_stored(value, STORED: tl.constexpr):
    """The nearest float32 that is a number of the type, halves to even."""
    if tl.bfloat16 == STORED:  # in integers, since Triton's interpreter cuts off instead of rounding
        return with_mantissa(value, 16)
    return value.to(STORED).to(tl.float32)


@triton.jit
def nearest_code(target, COARSENING: tl.constexpr):
    """The nearest integer, or code of E2M1 in halves; halves to even. Of numbers within the grid's limits."""
    if COARSENING:
        size = tl.abs(target)
        step = tl.where(size <= 4, 1.0, tl.where(size <= 8, 2.0, 4.0))
        result = ((target / step + _ROUND) - _ROUND) * step
    else:
        result = (target + _ROUND) - _ROUND
    return result
