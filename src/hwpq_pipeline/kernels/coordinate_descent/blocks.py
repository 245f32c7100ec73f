"""How a descent begins and how its columns are cut, which the kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
WIDEST_REFIT = 256


def block_columns(columns: int, size: int) -> int:
    """Columns a block: whole groups where a group is no wider than `WIDEST_REFIT`, about `BLOCK` otherwise."""
    if size > WIDEST_REFIT:
        return next(width for width in range(min(BLOCK, size), 0, -1) if size % width == 0)
    groups = max(BLOCK // size, 1)
    while (columns // size) % groups:
        groups -= 1
    return size * groups


def begin(codes: Tensor, scale: Tensor, original: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q − W₀ and its gradient (Q − W₀)G, both (out, in), and every row's objective, (out,)."""
    change = codes.float().mul_(scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)).sub_(original)
    gradient = change @ gram
    return change, gradient, objective(change, gradient)


def objective(change: Tensor, gradient: Tensor) -> Tensor:
    """(out,) ½ (q − w₀) G (q − w₀)ᵀ of every row."""
    return 0.5 * torch.linalg.vecdot(change, gradient)
