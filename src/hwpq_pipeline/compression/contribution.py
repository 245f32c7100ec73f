"""Contribution (saliency, importance): what the removal of a weight costs, dense and factored.

`W` is a linear layer's weight, shape (out, in). `x_j²` is the energy (second moment) of input j, summed over
calibration tokens: the diagonal of the Gram matrix. `S = Σ_j x_j²`. All metrics are on the scale of `w²`:

    hwpq           L_ij = w_ij² / (1 − x_j²/S)                    arXiv 2501.16376, the paper's closed form
    hwpq_weighted  L_ij = w_ij² x_j² / (1 − x_j²/S)               the same, with the input's energy kept
    wanda          L_ij = w_ij² x_j²                              arXiv 2306.11695, eq. 1, squared
    ria            L_ij = ((|w_ij| / Σ_i|w_ij| + |w_ij| / Σ_j|w_ij|) · (x_j²)^(a/2))², a = 1/2
                                                                  ICLR 2024 (plug-and-play), eq. 4, squared
    magnitude      L_ij = w_ij²

**Factors.** Every metric is the square of `z_ij = |w_ij| · (u_j + r_i v_j)`: two vectors over the inputs and one over
the rows. The fused kernels take these three vectors and never see a matrix `L`. `sqrt(L)` is `z` itself, so the default
domain of the selection needs neither a square nor a root, and a tiny weight's square cannot underflow.

**Edges.** One input that holds all the energy makes the denominator zero. The denominator is floored at 2⁻²⁴
(float32's resolution), so that this input's weights rank above all others of their size but stay finite. Without any
energy (S = 0: no calibration token reached the layer) nothing is known of the inputs, and every metric is the
magnitude. A row or column of zero weights has no relative importance: its RIA term is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

Vector = np.ndarray[Any, np.dtype[np.float64]]

METRICS = ("hwpq", "hwpq_weighted", "wanda", "ria", "magnitude")

#: The floor of `1 − x_j²/S`: one input with (almost) all the energy still has a finite contribution.
SMALLEST_REST = 2.0**-24

#: RIA's exponent on the input's norm, as published.
RIA_EXPONENT = 0.5

#: The levels that `contribution_quantiles` reports.
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Factors:
    """A metric as vectors: `sqrt(L_ij) = |w_ij| · (column_j + row_i · cross_j)`, all float32.

    Attributes:
        column: shape (in,).
        row: shape (out,); zeros for every metric but RIA.
        cross: shape (in,); zeros for every metric but RIA.
    """

    column: Tensor
    row: Tensor
    cross: Tensor

    def rows(self, index: Tensor) -> Factors:
        """The factors of some rows of the layer."""
        return Factors(self.column, self.row[index], self.cross)


def check_inputs(metric: str, weight: Tensor, energy: Tensor) -> None:
    """Raise `HwpqError` for an unknown metric, shapes that do not fit, or a dtype without fractions."""
    if metric not in METRICS:
        raise HwpqError(
            f"unknown metric '{metric}'", where="contribution", remedy=f"Choose one of {', '.join(METRICS)}"
        )
    if weight.dim() != 2 or energy.shape != (weight.shape[1],) or 0 in weight.shape:
        raise HwpqError(
            f"a weight of shape {tuple(weight.shape)} does not fit energies of shape {tuple(energy.shape)}",
            where="contribution",
            remedy="Expected (out, in) and (in,): take the statistics of this layer's own input",
        )
    if not weight.dtype.is_floating_point:
        raise HwpqError(
            f"the weight's dtype is {weight.dtype}",
            where="contribution",
            remedy="Give a floating-point weight",
        )


def root_factors(metric: str, weight: Tensor, energy: Tensor) -> Factors:
    """The vectors of a metric's square root, computed in float64 and rounded once to float32.

    Args:
        metric: one of `METRICS`.
        weight: shape (out, in); only RIA reads it (sums along rows and columns).
        energy: shape (in,); Σ_tokens x_j².

    Raises:
        HwpqError: an unknown metric, shapes that do not fit, negative or non-finite energies.
    """
    check_inputs(metric, weight, energy)
    # numpy, because torch's smallest operations may wake its worker threads, which then spin on a core that the kernels
    # want.
    x2 = energy.detach().to(device="cpu", dtype=torch.float64).numpy()
    if not ((x2 >= 0) & (x2 < np.inf)).all():  # so that NaN is caught as well
        raise HwpqError(
            "the input energies hold negative or non-finite values",
            where="contribution",
            remedy="Collect the activation statistics again: sums of squares are finite and not negative",
        )
    row, cross = np.zeros(weight.shape[0]), np.zeros(weight.shape[1])
    if not x2.any():
        column = np.ones_like(x2)
    elif metric == "ria":
        by_row, by_column = _absolute_sums(weight)
        cross = np.sqrt(x2) ** RIA_EXPONENT
        row, column = _inverse(by_row), _inverse(by_column) * cross
    else:
        column = x2 if metric in ("hwpq_weighted", "wanda") else np.ones_like(x2)
        if metric in ("hwpq", "hwpq_weighted"):
            column = column / np.maximum(1 - x2 / x2.sum(), SMALLEST_REST)
        column = np.sqrt(column)
    return Factors(*(torch.from_numpy(part.astype(np.float32)).to(weight.device) for part in (column, row, cross)))


def contribution(metric: str, weight: Tensor, energy: Tensor) -> Tensor:
    """The dense contribution matrix `L`: the readable version, for reports and for trying new metrics.

    Args:
        metric: one of `METRICS`.
        weight: any floating dtype, shape (out, in).
        energy: shape (in,); Σ_tokens x_j².

    Returns:
        float32, shape (out, in), not negative.

    Raises:
        HwpqError: as `root_factors`.
    """
    return root_contribution(weight, root_factors(metric, weight, energy)).square()


def root_contribution(weight: Tensor, factors: Factors) -> Tensor:
    """`sqrt(L)`, float32, shape (out, in): `|w_ij| · (column_j + row_i · cross_j)` in this order of operations."""
    scale = factors.column + factors.row[:, None] * factors.cross
    return weight.float().abs() * scale


def contribution_quantiles(weight: Tensor, factors: Factors, values: int = 16384) -> dict[str, float]:
    """Quantiles of the contributions, from an even sample of the layer: `{"q01": …, "q50": …, "q99": …}`.

    Args:
        weight: shape (out, in).
        factors: of the metric.
        values: about how many weights to look at. To sort all of them would cost more than the selection.
    """
    rows = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], 64)).round().long()
    # An odd step does not fall in with heads and groups, whose sizes are even.
    step = max(1, len(rows) * weight.shape[1] // values) | 1
    columns = slice(None, None, step)
    some = Factors(factors.column[columns], factors.row[rows], factors.cross[columns])
    sample = root_contribution(weight[rows, columns], some).square()
    found = np.quantile(sample.cpu().numpy(), QUANTILES).tolist()
    return {f"q{round(100 * level):02d}": value for level, value in zip(QUANTILES, found, strict=True)}


def _absolute_sums(weight: Tensor, rows_at_once: int = 1024) -> tuple[Vector, Vector]:
    """Σ_j |w_ij| and Σ_i |w_ij| in float64, without a float64 copy of the whole weight."""
    by_row, by_column = [], torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for part in weight.detach().split(rows_at_once):
        size = part.to(torch.float32).abs()
        by_row.append(size.sum(dim=1, dtype=torch.float64))
        by_column += size.sum(dim=0, dtype=torch.float64)
    return torch.cat(by_row).cpu().numpy(), by_column.cpu().numpy()


def _inverse(values: Vector) -> Vector:
    """1 / values; 0 where a sum of no weights is 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)
