"""Correction: what a layer should compute when the layers before it are compressed already.

The inputs of a layer in a compressed model are not the dense model's ``X`` but ``X̃``, and what it should make of them
is not ``W₀X̃``, the answer to wrong inputs, but the dense model's output ``T = W₀X`` (GPTAQ, Li et al. 2025, arXiv
2504.02692).  Where the output is added to the residual stream, more can be asked: ``T = W₀X + (H − H̃)``, so that the
layer also makes up for what the stream has lost by then.  With ``G = X̃X̃ᵀ`` and ``B = TX̃ᵀ`` the best unrestricted
weights are those of the least-squares problem

    W* = argmin_W ‖WX̃ − T‖²_F + δ‖W − W₀‖²_F,        (W* − W₀)(G + δI) = B − W₀G,        δ = damping·mean(diag G),

and since, without damping, ‖WX̃ − T‖² = ‖(W − W*)X̃‖² + const for every ``W``, pruning, recovery and rounding need not
know of ``T``: they take ``W*`` for the dense weight.

How far.  With little damping a few steps of conjugate gradients from ``W₀`` fit the directions with much energy, and
many the calibration sample; with more damping more steps help (docs/decisions.md, 32: perplexity 72 towards ``W₀X̃``, 48
with the residual stream at 2:4, 20.6 dense).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.compression.recovery import check_problem, conjugate_gradients, normalised_gram
from hwpq_pipeline.errors import HwpqError

STEPS = 8


def corrected_target(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    *,
    steps: int = STEPS,
    damping: float = 0.01,
    where: str = "correction",
) -> Tensor:
    """The weights `W*` that take the inputs as they are nearest the outputs that are wanted.

    Args:
        weight: (out, in) the dense weight `W₀`.
        gram: (in, in) `Σ x̃ x̃ᵀ` of the inputs as they are.
        cross: (out, in) `Σ t x̃ᵀ` of the wanted outputs with them.
        steps: of conjugate gradients, all rows side by side; 0 returns the dense weight.
        damping: added to the diagonal, in units of its mean.
        where: the layer's name, for errors.

    Returns:
        (out, in) float32.

    Raises:
        HwpqError: shapes that do not match, or values that are not finite.
    """
    check_problem(weight, gram, None, where)
    if cross.shape != weight.shape or not bool(torch.isfinite(cross).all()):
        raise HwpqError(
            f"outputs of shape {tuple(cross.shape)} for a weight of {tuple(weight.shape)}, or values not finite",
            where=where,
            remedy="Check the weights of the layers before it.",
        )
    scaled, root, _ = normalised_gram(gram, damping)
    weight = weight.float()
    gradient = (weight @ gram.float() - cross).div_(root)
    change, _ = conjugate_gradients(scaled, torch.ones(1, 1, device=weight.device), gradient, steps, 0.0)
    return weight + change.div_(root)
