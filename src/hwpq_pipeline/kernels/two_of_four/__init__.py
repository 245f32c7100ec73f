"""2:4 selection: the two highest contributions in every aligned group of four inputs, by six comparisons, no sort.

`z = |w_ij| · (u_j + r_i · v_j)` is the root of the contribution, in float32 and this order of operations. Each of the
six pairs in a group has one winner: the greater, or among equals the one in the lower column. In such a tournament of
four the two best win at least two of their three games each and the others at most one, so a weight stays if it wins
two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.devices import wants_cuda

__all__ = ["select_two_of_four"]


def select_two_of_four(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Select two of every four inputs, on the device that the weight is on.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in), in divisible by 4; rows may be strided.
        column: float32, shape (in,): `u`.
        row: float32, shape (out,): `r`.
        cross: float32, shape (in,): `v`.

    Returns:
        `(keep, finite)`: uint8, shape (out, ceil(in / 8)), keep-bits in little bit order; and bool, shape (out,),
        whether all contributions of a row are finite (its bits mean nothing otherwise).

    Raises:
        HwpqError: a device without a kernel, columns that do not divide by 4.
    """
    on_cuda = wants_cuda(weight, "select_two_of_four")
    if weight.shape[1] % 4:
        raise HwpqError(
            f"{weight.shape[1]} columns do not divide into groups of 4",
            where="select_two_of_four",
            remedy="Leave this layer as it is (`ignore` in the variant), or choose an unstructured variant.",
        )
    u, r, v = (part.detach().to(weight.device, torch.float32).contiguous() for part in (column, row, cross))
    if on_cuda:
        from hwpq_pipeline.kernels.two_of_four import cuda

        return cuda.select(weight, u, r, v)
    from hwpq_pipeline.kernels.two_of_four import cpu

    keep, finite = cpu.select(weight, u.numpy(), r.numpy(), v.numpy())
    return torch.from_numpy(keep), torch.from_numpy(finite)
