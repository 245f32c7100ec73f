"""The readable version, which is torch's own arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def quantize(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize`."""
    weight = weight.float()
    absmax = weight.abs().amax(1, keepdim=True)
    scale = torch.where(absmax > 0, (absmax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    stored = scale.to(scale_dtype).float()
    scale = torch.where((stored > 0) & torch.isfinite(stored), stored, torch.finfo(scale_dtype).tiny)
    return (weight / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale
