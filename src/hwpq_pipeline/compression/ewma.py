"""Unstructured selection by a running threshold (the paper's EWMA): one pass along the rows, O(n), no sort.

`kernels.ewma_select` tells the rule, its warm start and what is defined to the bit. This module finds λ.

**Fixed multiplier** (the paper's mode): λ is given and the sparsity follows. `PAPER` holds the published setting,
α = β = 1/8 and λ = 4 on the contributions themselves. What passes, `L ≥ μ + λσ`, is the upper band: the few weights
that stand out among their neighbours, which the paper keeps at full precision (`upper_band`).

**Target sparsity**: λ is solved for. μ and σ do not depend on λ, so a weight's ratio `r = (x − μ)/σ` tells for every λ
at once whether the weight is dropped (r < λ). λ is therefore a quantile of `r`, and it is found by counting. There are
two scopes:

- `row`: every row has a λ of its own and loses the same share (Wanda, too, compares within an output). One pass solves
  all rows, a block at a time in cache, and one selects.
- `layer`: there is one λ, and the rows whose values scatter most lose least. A sample of rows says where to look for
  λ: `RUNGS` multipliers around the sample's own, as far out as its rows disagree. One pass counts what each of them
  drops in the whole layer, λ follows from these counts, and one pass selects. (A sample of all rows, in a small layer,
  needs no counting.)

Either way there are at most two passes over the weight. A row whose contributions are all equal has no λ: σ is 0, every
weight is kept, and the selection says so (`EwmaSelection.note`).

The domain and the gains matter. `sqrt` with α = 1/128 selects about as well as a full sort. `raw` with α = 1/8 lets
every outlier shadow its neighbours: μ and σ jump, and the weights after it are dropped. Smaller gains come closer to a
sort and read more columns for the warm start (2/α).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.compression.contribution import Factors, contribution_quantiles, root_factors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import ewma_select as kernels

Domain = Literal["sqrt", "log", "raw"]
Scope = Literal["row", "layer"]

#: How far a layer's sparsity may be from the wanted one, absolute.
TOLERANCE = 1e-3

#: How many multipliers a layer's λ is sought among, and how many standard errors of the sample they reach out.
RUNGS, REACH = 16, 6.0

#: Rows of the sample that a layer's λ is first solved on, and the fewest that tell how much rows differ.
SAMPLE_ROWS, SMALLEST_SAMPLE = 64, 16

#: Seed of the choice of rows: a selection is a function of its arguments.
SEED = 0


@dataclass(frozen=True)
class Threshold:
    """How a layer's running threshold is set. Exactly one of sparsity and multiplier is given.

    Attributes:
        alpha: gain of the running mean, in (0, 1].
        beta: gain of the running mean deviation, in (0, 1].
        domain: what the mean is taken of: `sqrt` of the contribution, its `log` (base 2), or itself (`raw`).
        scope: whose sparsity is solved for: each `row`'s or the `layer`'s. No matter with a fixed multiplier.
        sparsity: the share of weights to drop, in [0, 1).
        multiplier: a fixed λ.
    """

    alpha: float
    beta: float
    domain: Domain
    scope: Scope
    sparsity: float | None = None
    multiplier: float | None = None


#: The published setting (arXiv 2501.16376): TCP's gain and multiplier on the contributions.
PAPER = Threshold(alpha=1 / 8, beta=1 / 8, domain="raw", scope="layer", multiplier=4.0)


@dataclass(frozen=True)
class EwmaSelection:
    """Which weights of a layer stay, and how that came about.

    Attributes:
        keep: uint8, shape (out, ceil(in / 8)): keep-bits in little bit order.
        columns: the number of inputs.
        multiplier: λ, float32: shape (out,) for scope `row` with a target, else ().
        wanted: the sparsity asked for; None with a fixed multiplier.
        reached: the sparsity of the mask.
        mean: μ after the last column, averaged over the rows, in the units of the domain.
        deviation: σ after the last column, averaged in the same way.
        row_sparsity: the lowest and the highest sparsity of a row.
        constant_rows: rows without spread, kept whole.
        quantiles: of the contributions, from a sample (`contribution_quantiles`).
        passes: passes over the weight, the sample not counted.
    """

    keep: Tensor
    columns: int
    multiplier: Tensor
    wanted: float | None
    reached: float
    mean: float
    deviation: float
    row_sparsity: tuple[float, float]
    constant_rows: int
    quantiles: dict[str, float]
    passes: int

    @property
    def multiplier_mean(self) -> float:
        """λ as one number: the mean over the rows."""
        return float(self.multiplier.double().mean())

    @property
    def note(self) -> str:
        """Empty if the wanted sparsity was reached, else what was reached, and why."""
        if self.wanted is None or abs(self.reached - self.wanted) <= TOLERANCE:
            return ""
        why = (
            f"{self.constant_rows} of {self.keep.shape[0]} rows have contributions without spread and were kept whole"
            if self.constant_rows
            else "the contributions repeat so often that no threshold lies between"
        )
        return f"reached a sparsity of {self.reached:.4f} where {self.wanted:.4f} was wanted: {why}"


@dataclass(frozen=True)
class _Layer:
    """A layer as the kernels take it."""

    weight: Tensor
    factors: Factors
    average: kernels.Average

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.factors.column, self.factors.row, self.factors.cross

    def sample(self, rows: int) -> _Layer:
        """Some rows, chosen at random but always the same."""
        if rows >= self.weight.shape[0]:
            return self
        chosen = np.random.default_rng(SEED).choice(self.weight.shape[0], rows, replace=False)
        index = torch.from_numpy(np.sort(chosen))
        return replace(self, weight=self.weight[index], factors=self.factors.rows(index))


def ewma_select(
    weight: Tensor,
    metric: str,
    energy: Tensor,
    threshold: Threshold,
    *,
    sample_rows: int = SAMPLE_ROWS,
    where: str = "ewma_select",
) -> EwmaSelection:
    """Select the weights of a layer that stay, without a sort.

    Args:
        weight: float32 or bfloat16 (others are converted), shape (out, in).
        metric: one of `contribution.METRICS`.
        energy: shape (in,): Σ_tokens x_j².
        threshold: how it is set.
        sample_rows: rows that λ is first solved on, for scope `layer`.
        where: the layer's name, for errors.

    Raises:
        HwpqError: both or neither of sparsity and multiplier; values out of range; an unknown metric, domain or
            scope; statistics that do not fit; non-finite weights.
    """
    _check(threshold, sample_rows, where)
    average = kernels.Average(threshold.alpha, threshold.beta, threshold.domain)
    layer = _Layer(weight.detach(), root_factors(metric, weight.detach(), energy), average)
    lam, passes = _solve(layer, threshold, sample_rows)
    found = kernels.ewma_select(*layer.arguments, lam, average)
    _check_finite(found, where)
    columns = weight.shape[1]
    rows = 1 - found.kept.double() / columns
    return EwmaSelection(
        keep=found.keep,
        columns=columns,
        multiplier=lam,
        wanted=threshold.sparsity,
        reached=float(rows.mean()),
        mean=float(found.state[:, 0].double().mean()),
        deviation=float(found.state[:, 1].double().mean()),
        row_sparsity=(float(rows.min()), float(rows.max())),
        constant_rows=int(((found.state[:, 1] == 0) & (found.kept == columns)).sum()),
        quantiles=contribution_quantiles(layer.weight, layer.factors),
        passes=passes + 1,
    )


def upper_band(weight: Tensor, metric: str, energy: Tensor, *, where: str = "upper_band") -> EwmaSelection:
    """The weights that the paper keeps at full precision: `L ≥ μ + 4σ` with α = β = 1/8 on raw contributions.

    A kept bit of the result marks such a weight. The sparsity follows (on near-normal weights around 97 %). Arguments
    and errors as `ewma_select`.
    """
    return ewma_select(weight, metric, energy, PAPER, where=where)


def _solve(layer: _Layer, threshold: Threshold, sample_rows: int) -> tuple[Tensor, int]:
    """λ, float32, (out,) or (), and the passes over the weight that it took."""
    if threshold.multiplier is not None:
        return torch.tensor(threshold.multiplier).float(), 0
    if not threshold.sparsity:  # nothing to solve; every finite value passes
        return torch.tensor(-kernels.LARGEST).float(), 0
    if threshold.scope == "row":
        drops = _drops(layer.weight.shape, threshold.sparsity)
        return kernels.ewma_row_multipliers(*layer.arguments, drops, layer.average).float(), 1
    solved, passes = _solve_layer(layer, threshold.sparsity, sample_rows)
    return torch.tensor(solved).float(), passes


def _solve_layer(layer: _Layer, sparsity: float, sample_rows: int) -> tuple[float, int]:
    """One λ for the layer, and the passes that it took."""
    sample = layer.sample(sample_rows)
    ratios = kernels.ewma_ratios(*sample.arguments, sample.average)
    size = ratios.rows * ratios.columns
    lam = ratios.multiplier(round(sparsity * size))
    if sample is layer:
        return lam, 0
    spread = float(ratios.below(lam).double().std()) / ratios.columns
    reach = max(REACH * spread / ratios.rows**0.5, TOLERANCE)
    shares = sparsity + reach * torch.linspace(-1, 1, RUNGS, dtype=torch.float64)
    # Beyond the ends of the ladder, the sample's ends: every share of the layer lies between.
    counts = (shares.clamp(0, 1) * size).round().long().tolist()
    rungs = torch.tensor([-kernels.LARGEST, *(ratios.multiplier(count) for count in counts), kernels.LARGEST])
    dropped = kernels.ewma_dropped(*layer.arguments, rungs, layer.average)
    return _between(rungs.double(), dropped, round(sparsity * layer.weight.numel())), 1


def _between(rungs: Tensor, dropped: Tensor, wanted: int) -> float:
    """The multiplier for a wanted count, on the straight line between its neighbours on the ladder."""
    upper = int((dropped < wanted).sum().clamp(1, len(rungs) - 1))
    low, high = float(rungs[upper - 1]), float(rungs[upper])
    below, above = int(dropped[upper - 1]), int(dropped[upper])
    if above == below or abs(low) == kernels.LARGEST or abs(high) == kernels.LARGEST:
        nearest = int((dropped[1:-1] - wanted).abs().argmin()) + 1
        return float(rungs[nearest])
    return low + (high - low) * (wanted - below) / (above - below)


def _drops(shape: torch.Size, sparsity: float) -> Tensor:
    """How many weights each row loses: whole numbers that add up to the layer's share, spread evenly."""
    ends = (torch.arange(shape[0] + 1, dtype=torch.float64) * sparsity * shape[1]).round()
    return ends.diff().long()


def _check(threshold: Threshold, sample_rows: int, where: str) -> None:
    sparsity, multiplier = threshold.sparsity, threshold.multiplier
    if (sparsity is None) == (multiplier is None):
        given = "neither" if sparsity is None else "both"
        raise HwpqError(f"{given} of sparsity and multiplier given", where=where, remedy="Give exactly one of the two")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise HwpqError(f"the sparsity is {sparsity}", where=where, remedy="It is the share to drop, in [0, 1)")
    if multiplier is not None and not np.isfinite(multiplier):
        raise HwpqError(f"the multiplier is {multiplier}", where=where, remedy="Give a finite number; the paper's is 4")
    if threshold.scope not in ("row", "layer"):
        raise HwpqError(f"unknown scope '{threshold.scope}'", where=where, remedy="Choose row or layer")
    if sample_rows < SMALLEST_SAMPLE:
        raise HwpqError(
            f"sample_rows is {sample_rows}",
            where=where,
            remedy=f"Sample at least {SMALLEST_SAMPLE} rows: fewer do not tell how much rows differ",
        )


def _check_finite(found: kernels.EwmaPass, where: str) -> None:
    """A non-finite weight turns its row's state non-finite, for good."""
    finite = found.state.isfinite().all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).int().argmax())
        raise HwpqError(
            f"row {row} of the weight holds non-finite values (or contributions beyond float32)",
            where=where,
            remedy="Check the checkpoint: a damaged or overflowed weight cannot be compressed",
        )
