"""The oracle: the rule of the package's docstring, a column at a time, in numpy float32.

It is written to be read and compared with, not to be run on models. Every operation is one IEEE float32 operation in
the order written, so a kernel that keeps the order gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.kernels.ewma_select import Average
from hwpq_pipeline.kernels.ewma_select.gains import warm_gains

Vector = np.ndarray[Any, np.dtype[np.float32]]

#: log2(1 + f) ≈ f + f (1 − f) (A + f (B + f C)): exact at 0 and 1, at most 1.2e-4 off between.
LOG_A, LOG_B, LOG_C = np.float32(0.43873), np.float32(-0.23906), np.float32(0.08213)


def log2(z: Vector) -> Vector:
    """Base-2 logarithm of not-negative float32 by exponent and polynomial; zero gives −127, subnormals more."""
    bits = z.view(np.int32)
    exponent = ((bits >> 23) - 127).astype(np.float32)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32) - np.float32(1)
    correction = LOG_A + fraction * (LOG_B + fraction * LOG_C)
    bump = fraction * (np.float32(1) - fraction)
    return np.asarray(exponent + (fraction + bump * correction), np.float32)


def levels(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, domain: str) -> Vector:
    """The values that the running mean is taken of: `sqrt(L)`, `L` or `log2 sqrt(L)`, float32, (out, in)."""
    w = np.abs(weight.detach().to(torch.float32).numpy())
    u, r, v = (part.numpy() for part in (column, row, cross))
    z = w * (u[None, :] + r[:, None] * v[None, :])
    if domain == "raw":
        return np.asarray(z * z)
    return log2(z) if domain == "log" else np.asarray(z)


def ewma_select(
    weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, multiplier: Tensor, average: Average
) -> tuple[Tensor, Tensor]:
    """The keep-mask and the last state of each row.

    Args:
        weight: shape (out, in).
        column: float32, shape (in,); with `row` (out,) and `cross` (in,) the factors of `sqrt(L)`.
        row: see `column`.
        cross: see `column`.
        multiplier: λ of each row, float32, shape (out,).
        average: gains and domain.

    Returns:
        `(keep, state)`: bool (out, in), and float32 (out, 2) with μ and σ after the last column.
    """
    values = levels(weight, column, row, cross, average.domain)
    columns, alpha, beta = values.shape[1], average.alpha, average.beta
    bound, a, fade = multiplier.numpy() * np.float32(beta), np.float32(alpha), np.float32(1 - beta)
    alphas, fades, weights = warm_gains(alpha, beta, columns).astype(np.float32)
    mu, total = np.zeros((2, values.shape[0]), np.float32)
    with np.errstate(all="ignore"):
        for step, j in enumerate(range(columns - len(alphas), columns)):
            away = values[:, j] - mu
            total = fades[step] * total + weights[step] * np.abs(away)
            mu = mu + alphas[step] * away
        keep = np.empty(values.shape, dtype=bool)
        for j in range(columns):
            away = values[:, j] - mu
            keep[:, j] = away >= bound * total
            total = fade * total + np.abs(away)
            mu = mu + a * away
    return torch.from_numpy(keep), torch.from_numpy(np.stack([mu, total * np.float32(beta)], axis=1))
