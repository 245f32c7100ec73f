"""2:4 selection: in every aligned group of four inputs the two with the highest contribution (saliency) stay.

This is the one pattern of zeros that tensor cores skip. Half of the weights go, whatever they are. The price against
an unstructured half: a group with three weights that matter loses one of them, and a group with none keeps two. Among
equal contributions the one in the lower column stays, so the pattern is exact for any weight, also for all zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwpq_pipeline.compression.contribution import contribution_quantiles, root_factors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import two_of_four

GROUP, KEPT = 4, 2

#: The share of weights that go.
SPARSITY = 1 - KEPT / GROUP


@dataclass(frozen=True)
class TwoOfFour:
    """Which weights of a layer stay.

    Attributes:
        keep: uint8, shape (out, ceil(in / 8)): keep-bits in little bit order.
        reached: the mask's sparsity. It is `SPARSITY` by construction: the kernel keeps exactly two of every four.
        quantiles: of the contributions, from a sample (`contribution_quantiles`).
    """

    keep: Tensor
    reached: float
    quantiles: dict[str, float]


def select_two_of_four(weight: Tensor, metric: str, energy: Tensor, *, where: str = "select_two_of_four") -> TwoOfFour:
    """Keep the two weights with the highest contribution in every aligned group of four inputs.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in), in divisible by 4.
        metric: one of `contribution.METRICS`.
        energy: shape (in,): Σ_tokens x_j².
        where: the layer's name, for errors.

    Raises:
        HwpqError: columns that do not divide by 4; non-finite weights; an unknown metric; statistics that do not fit.
    """
    check_columns(weight.shape[-1], where)
    factors = root_factors(metric, weight.detach(), energy)
    keep, finite = two_of_four.select_two_of_four(weight, factors.column, factors.row, factors.cross)
    if not bool(finite.all()):
        raise HwpqError(
            f"row {int((~finite).int().argmax())} of the weight holds non-finite values "
            "(or contributions beyond float32)",
            where=where,
            remedy="Check the checkpoint: a damaged or overflowed weight cannot be compressed",
        )
    return TwoOfFour(keep, SPARSITY, contribution_quantiles(weight, factors))


def check_two_of_four(weight: Tensor, where: str) -> None:
    """Check the pattern: in every aligned group of four at most two weights are not zero; a mask keeps exactly two.

    Args:
        weight: shape (out, in); a bool mask (exactly two True a group), or weights (at most two not zero: a kept
            weight may have been rounded to zero).
        where: the layer's name, for errors.

    Raises:
        HwpqError: columns that do not divide by 4, or groups that break the pattern; the first of them is named.
    """
    check_columns(weight.shape[-1], where)
    # Four bools are one 32-bit number; multiplied by this one, its highest byte is their sum.
    nonzero = weight if weight.dtype == torch.bool else weight != 0
    kept = (nonzero.contiguous().view(torch.int32) * 0x01010101) >> 24
    wrong = kept != KEPT if weight.dtype == torch.bool else kept > KEPT
    if bool(wrong.any()):
        row, group = divmod(int(wrong.flatten().int().argmax()), kept.shape[-1])
        raise HwpqError(
            f"{int(wrong.sum())} groups of four are not 2:4, the first in row {row}, columns {GROUP * group} to "
            f"{GROUP * group + GROUP - 1}, with {int(kept.reshape(-1, kept.shape[-1])[row, group])} kept",
            where=where,
            remedy="A step after the selection must multiply by the mask; select again if the mask itself is wrong",
        )


def check_columns(columns: int, where: str) -> None:
    """Refuse a layer whose inputs are no aligned groups of four.

    Raises:
        HwpqError: the columns do not divide by 4.
    """
    if columns % GROUP:
        raise HwpqError(
            f"{columns} columns do not divide into groups of {GROUP}",
            where=where,
            remedy="Leave this layer as it is (`ignore` in the variant), or choose an unstructured variant.",
        )
