"""Correction: what a layer should compute when the layers before it are compressed already.

The inputs of a layer in a compressed model are not the dense model's `X` but `X̃`. What it should make of them is not
`W₀X̃`, the answer to wrong inputs, but the dense model's output `T = W₀X` (GPTAQ, Li et al. 2025, arXiv 2504.02692).
Where the output is added to the residual stream, it can do more: with `T = W₀X + (H − H̃)` the layer also makes up for
what the stream has lost by then. With `G = X̃X̃ᵀ` the best unrestricted weights solve the least-squares problem

    W* = argmin_W ‖WX̃ − T‖²_F + δ‖W − W₀‖²_F,    (W* − W₀)(G + δI) = (T − W₀X̃)X̃ᵀ,    δ = damping·mean(diag G),

Without damping, ‖WX̃ − T‖² = ‖(W − W*)X̃‖² + const for every `W`. So pruning, recovery and rounding need not know `T`:
they take `W*` for the dense weight.

How far. With little damping a few steps of conjugate gradients from `W₀` fit the directions with much energy, and many
steps fit the calibration sample. With more damping more steps help (docs/decisions.md, 32: at 2:4 perplexity is 72
towards `W₀X̃`, 48 with the residual stream, 20.6 dense).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.compression.recovery import check_problem, conjugate_gradients, even_tiles, normalised_gram
from hwpq_pipeline.errors import HwpqError

#: Bytes of the weights that are solved for at a time, in float32; the solver holds five times as many.
TILE = 2**24


def corrected_target(
    weight: Tensor,
    gram: Tensor,
    missing: Tensor,
    *,
    steps: int,
    damping: float,
    where: str = "correction",
) -> Tensor:
    """The weights `W*` that bring the inputs as they are nearest the wanted outputs.

    Args:
        weight: (out, in) the dense weight `W₀`.
        gram: (in, in) `Σ x̃ x̃ᵀ` of the inputs as they are.
        missing: (out, in) `Σ (t − W₀x̃) x̃ᵀ`, where `t − W₀x̃` is what the dense weight's outputs lack. The caller takes
            this difference token by token: the sum over tokens may then be in bfloat16, which a difference of two
            sums may not.
        steps: conjugate-gradient steps, all rows side by side; 0 returns the dense weight.
        damping: added to the diagonal, in units of its mean.
        where: the layer's name, for errors.

    Returns:
        (out, in) float32.

    Raises:
        HwpqError: shapes that do not match, or values that are not finite.
    """
    check_problem(weight, gram, None, where)
    if missing.shape != weight.shape or not bool(torch.isfinite(missing).all()):
        raise HwpqError(
            f"outputs of shape {tuple(missing.shape)} for a weight of {tuple(weight.shape)}, or values not finite",
            where=where,
            remedy="Check the weights of the layers before it.",
        )
    scaled, root, _ = normalised_gram(gram, damping)
    ones = torch.ones(1, 1, device=weight.device)
    target = torch.empty(weight.shape, device=weight.device)
    for rows in even_tiles(weight.shape[0], max(1, TILE // (4 * weight.shape[1]))):
        change, _ = conjugate_gradients(scaled, ones, -missing[rows] / root, steps, 0.0)
        torch.add(weight[rows].float(), change.div_(root), out=target[rows])
    return target
