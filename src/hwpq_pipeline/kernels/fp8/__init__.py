"""Rounding to FP8 E4M3 with one scale a row: `scale = absmax/448`, in the type that it will be stored in, and codes.

`reference` is plain torch, and the CPU runs it too. `cuda` reads the weight twice, the second time from the cache. They
agree to the bit. A row of nothing but zeros has scale one. Rounding is half to even, and saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.devices import wants_cuda
from hwpq_pipeline.kernels.fp8 import reference

E4M3_MAX = reference.E4M3_MAX

__all__ = ["E4M3_MAX", "quantize"]


def quantize(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes (out, in) float8_e4m3fn, and scales (out, 1) float32 that are numbers of `scale_dtype`.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in), finite.
        scale_dtype: float32, bfloat16 or float16.

    Raises:
        HwpqError: a device without a kernel.
    """
    if wants_cuda(weight, "fp8"):
        from hwpq_pipeline.kernels.fp8 import cuda

        return cuda.quantize(weight, scale_dtype)
    return reference.quantize(weight, scale_dtype)
