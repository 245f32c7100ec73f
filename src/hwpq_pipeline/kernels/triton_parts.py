"""What CUDA kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Triton's names of the types that scales are stored in.
STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def as_stored(value, STORED: tl.constexpr):
    """The nearest float32 that is a number of the type, halves to even."""
    if tl.bfloat16 == STORED:  # in integers, since Triton's interpreter cuts off instead of rounding
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = value.to(STORED).to(tl.float32)
    return result
