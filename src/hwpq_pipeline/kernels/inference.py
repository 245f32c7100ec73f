"""What the kernels of packed and rounded weights take: floats, and no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

#: What `nn.Linear` multiplies on the CPU.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(x: Tensor, width: int, *, where: str) -> None:
    """Refuse inputs that a kernel would read as something else, and those that want gradients: it has none to give.

    Args:
        x: what is given.
        width: its last dimension, as the weight wants it.
        where: the operation's name, for errors.

    Raises:
        HwpqError: no dimension or another width, no floats of 16 bits or more, or gradients that are wanted.
    """
    if not x.ndim or x.shape[-1] != width:
        found = f"{x.shape[-1]} inputs" if x.ndim else "a single number"
        raise HwpqError(f"{found} instead of {width} inputs", where=where, remedy="Give the layer its own.")
    if x.dtype not in FLOATS:
        raise HwpqError(f"inputs of {x.dtype}", where=where, remedy="Give floats of 16 bits or more.")
    if x.requires_grad and torch.is_grad_enabled():
        raise HwpqError(
            "an input wants gradients, and this is for inference only",
            where=where,
            remedy="Compute under torch.no_grad(), or train the dense model.",
        )
