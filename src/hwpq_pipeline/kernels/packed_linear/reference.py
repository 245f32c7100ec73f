"""The readable version: each kept value times the input that its position names, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_linear(kept: Tensor, positions: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """(out,) float64.

    Args:
        kept: (out, in / 2) values or codes: of each group of four inputs the two that are kept.
        positions: (out, ⌈in / 8⌉) uint8: four bits a group, lowest first; two bits name the column of each.
        scale: (out, scale groups): of equal numbers of inputs each.
        x: (in,).
    """
    rows, half = kept.shape
    spread = scale.double().repeat_interleave(2 * half // scale.shape[1], dim=1)
    result = torch.zeros(rows, dtype=torch.float64)
    for j in range(half):
        group, second = divmod(j, 2)
        place = positions[:, group // 2].long() >> (4 * (group % 2) + 2 * second) & 3
        column = 4 * group + place
        result += spread[:, 4 * group] * kept[:, j].double() * x.double()[column]
    return result
