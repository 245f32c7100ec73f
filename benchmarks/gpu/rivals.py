"""The rivals' inner loops, written from their papers: a Cholesky factor of the inverse Hessian, then column by column.

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1) and GPTQ (Frantar et al. 2022, arXiv 2210.17323,
algorithm 1) share it: a column is pruned or rounded, its error divided by the factor's diagonal moves the columns after
it, at once within a block of 128 and by one product for the rest. Scales of a group are searched as ours are, on the
weights as they are when the group's turn comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.scales import search_scale

BLOCK = 128


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Upper Cholesky factor of (G + damping · mean(diag G) I)⁻¹, float32, (in, in)."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def solve(weight: Tensor, gram: Tensor, *, prune: bool = False, group: int | None = None) -> Tensor:
    """The compressed weight, float32, (out, in).

    Args:
        weight: (out, in), in divisible by four and by the group.
        gram: (in, in) float32.
        prune: to 2:4 (SparseGPT).
        group: columns that share a scale of an int4 grid (GPTQ); None not to round.
    """
    factor = inverse_factor(gram)
    weight = weight.float().clone()
    columns = weight.shape[1]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        part, local = weight[:, first:last], factor[first:last, first:last]
        errors = torch.zeros_like(part)
        gone = torch.zeros(part.shape, dtype=torch.bool, device=weight.device)
        scale = torch.ones(weight.shape[0], 1, device=weight.device)
        for i in range(last - first):
            if prune and i % 4 == 0:
                price = part[:, i : i + 4].square() / local.diagonal()[i : i + 4].square()
                gone.scatter_(1, i + price.topk(2, dim=1, largest=False).indices, True)
            if group and (first + i) % group == 0:
                ahead = weight[:, first + i : first + i + group].contiguous()
                scale = search_scale(ahead, GRIDS["int4"], group)
            now = part[:, i]
            value = now.masked_fill(gone[:, i], 0.0)
            if group:
                value = (value / scale[:, 0]).round_().clamp_(-8, 7) * scale[:, 0]
            error = (now - value) / local[i, i]
            part[:, i + 1 :].addr_(error, local[i, i + 1 :], alpha=-1.0)
            part[:, i] = value
            errors[:, i] = error
        weight[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1.0)
    return weight


def wanda_mask(weight: Tensor, energy: Tensor, sparsity: float = 0.5) -> Tensor:
    """`prune_wanda` of its authors (arXiv 2306.11695): stable sort of the scores; True is dropped."""
    metric = weight.abs() * energy.sqrt().reshape(1, -1)
    mask = torch.zeros_like(metric, dtype=torch.bool)
    order = torch.sort(metric, dim=-1, stable=True).indices
    return mask.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
