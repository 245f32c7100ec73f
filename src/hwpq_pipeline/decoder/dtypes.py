"""The dtype of a forward pass. `auto` has one meaning: bfloat16 where the hardware multiplies it, else float32.

Where bfloat16 is emulated, software widens every element, and it is slower than float32.
"""

from __future__ import annotations

import torch

from hwpq_pipeline.errors import HwpqError

_KNOWN = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, device: torch.device, *, where: str = "dtype") -> torch.dtype:
    """The dtype that a word stands for on a device.

    Args:
        dtype: `auto`, `float32` or `bfloat16`.
        device: where the forward pass runs.
        where: the parameter, for errors.

    Raises:
        HwpqError: another word.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if dtype not in _KNOWN:
        raise HwpqError(f"unknown dtype {dtype!r}", where=where, remedy=f"Choose one of auto, {', '.join(_KNOWN)}.")
    return _KNOWN[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, for example `float32`."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16"))
