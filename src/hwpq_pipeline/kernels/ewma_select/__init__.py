"""EWMA selection: one pass along each row, no sort.  The rule, to the bit:

    z = |w_ij| · (u_j + r_i · v_j)                 sqrt of the contribution, from the metric's factors
    x = z          domain "sqrt"
        z · z      domain "raw": the contribution L itself
        log2(z)    domain "log": half of log2 L, by exponent and polynomial (`reference.log2`)
    d = x − μ
    keep w_ij if   d ≥ (λ_i β) S                   that is x ≥ μ + λσ: a weight is judged by the columns before it, as
                                                   TCP judges a round trip by those before it
    S ← (1 − β) S + |d|;   μ ← μ + α d             that is σ ← σ + β (|d| − σ) with σ = β S (Jacobson 1988)

in float32, in this order of operations, without fused multiply-add. `S` in the place of σ saves an operation a weight.

**Warm start.** A row is treated as a ring: before column 0 the recurrence runs over the row's *last*
`warm = min(in, ⌈2 / min(α, β)⌉)` columns, from `μ = x` of the first of them and `σ = 0`, with gains
`max(α, 1 / (t + 1))`. This is a plain mean until it has as long a memory as the running one. So column 0 is judged by a
settled estimate that does not contain column 0 itself, and no position of a row is favoured: on i.i.d. rows the keep
rate is flat. The price is that `warm` columns are read twice. In a row whose values are all equal `d` is exactly 0: σ
stays 0 and every weight is kept, whatever λ is.

The CPU's mask is the reference's to the bit. The CUDA kernel adds in another order. Its mask differs only where a
weight lies on the line but for rounding; its own docstring says how near. Gains above 1/2 have no CUDA kernel.

**Non-finite weights** turn a row's μ into NaN or infinity, where it stays. The returned state shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.devices import wants_cuda

DOMAINS = ("sqrt", "log", "raw")

#: Stands for an infinite ratio. As a multiplier it lies above all ratios, and its negative below all.
LARGEST = torch.finfo(torch.float32).max

#: Most counts that a search for a multiplier makes. It ends before, once the count is exact or the bracket is empty.
SEARCH_STEPS = 60

__all__ = [
    "DOMAINS",
    "LARGEST",
    "SEARCH_STEPS",
    "Average",
    "EwmaPass",
    "Ratios",
    "ewma_dropped",
    "ewma_ratios",
    "ewma_row_multipliers",
    "ewma_select",
]


@dataclass(frozen=True)
class Average:
    """The moving average.

    Attributes:
        alpha: gain of μ, in (0, 1].
        beta: gain of σ, in (0, 1].
        domain: one of `DOMAINS`.
    """

    alpha: float
    beta: float
    domain: str


@dataclass(frozen=True)
class EwmaPass:
    """What one pass gives.

    Attributes:
        keep: uint8, shape (out, ceil(in / 8)), packed in little bit order; 1 keeps.
        kept: int64, shape (out,): kept weights of each row.
        state: float32, shape (out, 2): μ and σ after the row's last column, in the units of the domain.
    """

    keep: Tensor
    kept: Tensor
    state: Tensor


class Ratios(Protocol):
    """`(x − μ) / σ` of every weight of some rows: a weight is dropped when this is below λ (but for rounding).

    Where σ is 0 it is `LARGEST` (kept whatever λ is), negative if x < μ. The ratios are as large as the float32
    weight, so they are for samples of rows.

    Attributes:
        rows: how many rows.
        columns: how many inputs.
    """

    rows: int
    columns: int

    def below(self, multiplier: float) -> Tensor:
        """How many weights of each row are dropped at a multiplier: int64, (rows,)."""

    def multiplier(self, drop: int) -> float:
        """The multiplier at which `drop` weights of all rows together are dropped, or as near as repeats allow."""

    def matrix(self) -> Tensor:
        """float32, shape (rows, columns)."""


class _Pass(Protocol):
    """A layer made ready for one device's kernel: see `cpu.Pass`."""

    def select(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def ratios(self) -> Ratios: ...

    def row_multipliers(self, drop: Tensor) -> Tensor: ...

    def dropped(self, multipliers: Tensor) -> Tensor: ...


def ewma_select(
    weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, multiplier: Tensor, average: Average
) -> EwmaPass:
    """Select the weights of a layer in one pass, on the device that the weight is on.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in); rows may be strided.
        column: float32, shape (in,): `u`.
        row: float32, shape (out,): `r`.
        cross: float32, shape (in,): `v`.
        multiplier: float32, shape (out,) or (): λ of each row, or of all.
        average: gains and domain.

    Raises:
        HwpqError: a device without a kernel, an unknown domain, a gain outside (0, 1].
    """
    prepared = _prepare(weight, column, row, cross, average)
    lam = multiplier.detach().to(weight.device, torch.float32).expand(weight.shape[0]).contiguous()
    return EwmaPass(*prepared.select(lam))


def ewma_ratios(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, average: Average) -> Ratios:
    """The ratios `(x − μ) / σ` of a (sample of a) layer. Arguments and errors as `ewma_select`."""
    return _prepare(weight, column, row, cross, average).ratios()


def ewma_dropped(
    weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, multipliers: Tensor, average: Average
) -> Tensor:
    """How many weights of the layer each of several multipliers drops, int64, (k,); in one pass, without a mask.

    `multipliers` is float32, (k,). Other arguments and errors as `ewma_select`.
    """
    prepared = _prepare(weight, column, row, cross, average)
    return prepared.dropped(multipliers.to(weight.device, torch.float32).contiguous())


def ewma_row_multipliers(
    weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, drop: Tensor, average: Average
) -> Tensor:
    """λ of each row such that `drop` (int64, (out,)) of its weights are dropped, float32, (out,); in one pass.

    Where values repeat, it is the λ with the nearest count. A row without spread (σ = 0) has none, and gets 0. Other
    arguments and errors as `ewma_select`.
    """
    prepared = _prepare(weight, column, row, cross, average)
    return prepared.row_multipliers(drop.to(weight.device, torch.int64).contiguous())


def _prepare(weight: Tensor, column: Tensor, row: Tensor, cross: Tensor, average: Average) -> _Pass:
    """Check, and choose the kernel by the weight's device."""
    on_cuda = wants_cuda(weight, "ewma_select")
    if average.domain not in DOMAINS:
        raise HwpqError(
            f"unknown domain '{average.domain}'", where="ewma_select", remedy=f"Choose one of {', '.join(DOMAINS)}"
        )
    for name, gain in (("alpha", average.alpha), ("beta", average.beta)):
        if not 0 < gain <= 1:
            raise HwpqError(f"{name} is {gain}", where="ewma_select", remedy="A gain lies in (0, 1], for instance 1/64")
    column, row, cross = (part.detach().to(weight.device, torch.float32).contiguous() for part in (column, row, cross))
    if on_cuda:
        from hwpq_pipeline.kernels.ewma_select import cuda

        return cuda.Pass(weight, column, row, cross, average)
    from hwpq_pipeline.kernels.ewma_select import cpu

    return cpu.Pass(weight, column, row, cross, average)
