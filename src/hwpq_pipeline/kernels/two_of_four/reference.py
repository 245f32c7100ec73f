"""The oracle: sort each group of four by contribution and keep the first two, in plain Python."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def select_two_of_four(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor) -> Tensor:
    """The keep-mask: bool, shape (out, in).

    Args:
        weight: shape (out, in), in divisible by 4.
        column: float32, shape (in,); with `row` (out,) and `cross` (in,) the factors of `sqrt(L)`.
        row: see `column`.
        cross: see `column`.
    """
    w = np.abs(weight.detach().to(torch.float32).numpy())
    u, r, v = (part.numpy() for part in (column, row, cross))
    z = w * (u[None, :] + r[:, None] * v[None, :])
    keep = np.zeros(z.shape, dtype=bool)
    for i in range(z.shape[0]):
        for first in range(0, z.shape[1], 4):
            # Highest contribution first; of equal ones the lower column.
            best = sorted(range(first, first + 4), key=lambda j: (-z[i, j], j))
            keep[i, best[:2]] = True
    return torch.from_numpy(keep)
