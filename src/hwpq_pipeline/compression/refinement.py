"""Refinement: the mask moved together with the weights, for every preset but `fixed_mask`.

A mask chosen by scores ignores that the weights which stay can make up for those that go.  Refinement minimises

    min_W ‖(W − W₀)X‖²_F + δ‖W − W₀‖²_F    subject to    two non-zeros in every aligned four, or a share of all,

by coordinate descent in the variables ``V = W·s``, ``s = diag(G + δI)^½``, where the quadratic's diagonal is one (see
``kernels.mask_descent``).  It begins at the dense weights, which have no error: in the first sweep every group of four
takes its best pair knowing what the groups before it lost, and makes up for that (SparseGPT's principle, Frantar and
Alistarh 2023, without the inverse that it needs).  In the first ``rounds`` sweeps what goes is not dropped but halved
each time, so that the pairs are chosen against a row that is dense, then less so; the last ``sweeps`` drop it, move the
pairs on, and end with weights that are almost optimal for their mask.  All is matrix products and small tiles; the
objective of the last sweeps cannot rise.

Descent or ADMM.  ALPS-style ADMM (Meng et al. 2024, arXiv 2406.07831) keeps the row dense for longer and finds better
masks, at three matrix products a round (conjugate gradients for its inner solve).  ``method="admm"`` takes its mask
and values as the start of the descent, which needs then no ``rounds`` of its own.  In a trial at 2:4, perplexity 20.6
dense and 73.5 for recovery on a fixed mask: descent alone 65.8; 10 rounds of ADMM, then 3 sweeps 62.0 in about twice
the time.

Damping.  ``δ`` is 0.01 of the mean energy.  More lowers the layers' error on held-out text (least at 0.2 to 0.3) but
not the perplexity of the model (65.8 at 0.01, 66.4 at 0.1 in a trial at 2:4).

Where.  ``kernels.mask_descent`` has kernels for the CPU alone: tensors on a GPU are worked on there and come back.

Unstructured: one threshold a layer on what keeping a weight gains.  It is set after every sweep to the score that the
wanted share exceeds, found by counting (no sort), and the sparsity is met exactly but for ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.compression.recovery import check_problem, normalised_gram, output_error, relative_error
from hwpq_pipeline.errors import HwpqError

STRUCTURES = ("2of4", "unstructured")
METHODS = ("descent", "admm")
SHRINK = 0.5
ROW_TILE = 1024
ADMM_RHO, ADMM_GROWTH, ADMM_STEPS = 0.3, 1.2, 3


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Attributes:
        error_before: relative output error of the given mask alone, ‖(W₀∘M − W₀)X‖²_F / ‖W₀X‖²_F.
        error_after: that of the refined weights.
        sparsity: share of weights that went.
        moved: share of the mask's entries that changed.
        row_error_before: (out,) squared output error of each row with the given mask alone.
        row_error: (out,) squared output error of each row after.
        row_energy: (out,) ‖w₀X‖² of each row.
    """

    error_before: float
    error_after: float
    sparsity: float
    moved: float
    row_error_before: Tensor
    row_error: Tensor
    row_energy: Tensor

    def relative_errors(self, rows: slice) -> tuple[float, float]:
        """Relative output error (before, after) of some rows, for layers that were stacked over one ``G``."""
        energy = self.row_energy[rows]
        return relative_error(self.row_error_before[rows], energy), relative_error(self.row_error[rows], energy)


def refine_mask(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    structure: str = "2of4",
    sparsity: float | None = None,
    rounds: int = 4,
    sweeps: int = 4,
    damping: float = 0.01,
    method: str = "descent",
    layer_rows: Sequence[int] | None = None,
    where: str = "refinement",
) -> tuple[Tensor, Tensor, Refinement]:
    """Weights and mask whose outputs are nearest the dense layer's.

    Args:
        weight: (out, in) the dense weight; layers that read the same input may be stacked.
        mask: (out, in) bool, a mask to start from (ADMM's first, and the one that the result is compared with and,
            should it not be better, falls back on: row by row for 2of4, else layer by layer where it has the
            wanted sparsity).
        gram: (in, in) Σ x xᵀ over the calibration tokens.
        structure: ``2of4`` or ``unstructured``.
        sparsity: for ``unstructured``, the share of each layer's weights that goes; None for the mask's own.
        rounds: sweeps in which what goes is halved; with ``method="admm"`` ADMM's rounds.
        sweeps: sweeps after that, with what goes gone; one at least (unstructured: the mask stands in the last half).
        damping: added to the diagonal, in units of its mean.
        method: ``descent``, or ``admm`` for ADMM's mask as the descent's start.
        layer_rows: rows of each stacked layer, for ``unstructured``; None for one layer.
        where: the layer's name, for errors.

    Returns:
        Weight (out, in) float32, zero outside its mask; mask (out, in) bool; and the report.

    Raises:
        HwpqError: shapes that do not match, values that are not finite, columns that do not divide by four,
            or an unknown structure or method.
    """
    check_problem(weight, gram, mask, where)
    if weight.device.type != "cpu":
        return _on_the_cpu(
            weight, mask, gram, structure=structure, sparsity=sparsity, rounds=rounds, sweeps=sweeps, damping=damping,
            method=method, layer_rows=layer_rows, where=where,
        )  # fmt: skip
    heights = [weight.shape[0]] if layer_rows is None else list(layer_rows)
    _check_choice(structure, method, weight, heights, where)
    weight = weight.float()
    scaled, root, _ = normalised_gram(gram, damping)
    target = weight * root
    layers = _slices(heights)
    kept = [_wanted(mask[rows], sparsity if structure == "unstructured" else None) for rows in layers]
    problem = _Problem(target, scaled, structure, layers, kept)
    if method == "admm":
        values, keep = _descend(problem, _admm(problem, rounds), 0, sweeps)
    else:
        values, keep = _descend(problem, None, rounds, sweeps)
    refined = (values / root) * keep
    comparable = layers if structure == "unstructured" else None
    if comparable is not None:
        comparable = [rows for rows, count in zip(layers, kept, strict=True) if count == int(mask[rows].sum())]
    return _guard(weight, mask, gram, refined, keep, comparable)


def _on_the_cpu(weight: Tensor, mask: Tensor, gram: Tensor, **options: Any) -> tuple[Tensor, Tensor, Refinement]:
    """`refine_mask` of tensors that lie elsewhere; the results lie there too."""
    refined, keep, report = refine_mask(weight.cpu(), mask.cpu(), gram.cpu(), **options)
    rows = {name: getattr(report, name).to(weight.device) for name in ("row_error_before", "row_error", "row_energy")}
    return refined.to(weight.device), keep.to(weight.device), replace(report, **rows)


@dataclass(frozen=True)
class _Problem:
    """Target V₀ (out, in), Ĝ (in, in), the structure, and for unstructured masks each layer's rows and kept weights."""

    target: Tensor
    gram: Tensor
    structure: str
    layers: list[slice]
    kept: list[int]


def _check_choice(structure: str, method: str, weight: Tensor, heights: list[int], where: str) -> None:
    if structure not in STRUCTURES:
        raise HwpqError(
            f"unknown structure {structure!r}", where=where, remedy=f"Choose one of {', '.join(STRUCTURES)}."
        )
    if method not in METHODS:
        raise HwpqError(f"unknown refinement {method!r}", where=where, remedy=f"Choose one of {', '.join(METHODS)}.")
    if structure == "2of4" and weight.shape[1] % 4:
        raise HwpqError(
            f"{weight.shape[1]} columns do not divide into groups of four",
            where=where,
            remedy="Leave the layer dense or choose the unstructured sparsity.",
        )
    if sum(heights) != weight.shape[0]:
        raise HwpqError(
            f"layers of {heights} rows do not make {weight.shape[0]}", where=where, remedy="Pass every layer's rows."
        )


def _slices(heights: list[int]) -> list[slice]:
    ends = torch.tensor(heights).cumsum(0).tolist()
    return [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]


def _wanted(mask: Tensor, sparsity: float | None) -> int:
    """How many weights of a layer stay."""
    return int(mask.sum()) if sparsity is None else mask.numel() - round(sparsity * mask.numel())


def _descend(problem: _Problem, start: Tensor | None, rounds: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Values and keep-mask (out, in) after the sweeps, from ``start`` (changed in place) or, if None, the target."""
    from hwpq_pipeline.kernels.mask_descent import cpu  # brings numba, which a machine with a GPU need not have

    values = problem.target.clone() if start is None else start
    keep = torch.ones(values.shape, dtype=torch.bool)
    shrinks = [SHRINK] * rounds + [0.0] * max(sweeps, 1)
    final = len(shrinks) - 1

    def gradient_of(rows: slice) -> Tensor:
        if start is None:
            return torch.zeros_like(values[rows])
        return (values[rows] - problem.target[rows]) @ problem.gram

    if problem.structure == "2of4":
        inverses = cpu.pair_inverses(problem.gram)
        for first in range(0, values.shape[0], ROW_TILE):
            rows = slice(first, first + ROW_TILE)
            gradient = gradient_of(rows)
            for sweep, shrink in enumerate(shrinks):
                cpu.two_of_four(values[rows], keep[rows], gradient, problem.gram, inverses, shrink, last=sweep == final)
        return values, keep
    gradient = gradient_of(slice(None))
    scores = problem.target.abs()
    settling = max(sweeps // 2, 1)
    for shrink in shrinks[:-settling] or shrinks[:1]:
        cpu.columns(values, keep, scores, gradient, problem.gram, _thresholds(problem, scores), shrink)
    torch.gt(scores, _thresholds(problem, scores)[:, None], out=keep)
    for left in reversed(range(settling)):  # the mask stands: its weights settle
        cpu.columns(values, keep, scores, gradient, problem.gram, None, 0.0, last=left == 0)
    return values, keep


def _thresholds(problem: _Problem, scores: Tensor) -> Tensor:
    """(out,) the score that the wanted number of weights in a row's layer exceeds."""
    from hwpq_pipeline.kernels.mask_descent import cpu

    result = torch.empty(scores.shape[0])
    for rows, kept in zip(problem.layers, problem.kept, strict=True):
        result[rows] = cpu.threshold(scores[rows], kept)
    return result


def _admm(problem: _Problem, rounds: int) -> Tensor:
    """Sparse values (out, in) of ADMM: the inner solve by warm-started conjugate gradients.

    ``V ← argmin ½ tr((V − V₀)Ĝ(V − V₀)ᵀ) + ρ/2 ‖V − D + U‖²;  D ← projection of V + U;  U ← U + V − D;  ρ ← 1.2 ρ``
    (ALPS, arXiv 2406.07831, equation 5, in the normalised variables).  ``(V − V₀)Ĝ`` is carried, so that a step is one
    matrix product and a round begins with none.
    """
    values, gradient = problem.target.clone(), torch.zeros_like(problem.target)
    dual = torch.zeros_like(values)
    sparse = _project(problem, values)
    rho = ADMM_RHO
    for _ in range(rounds):
        residual = (sparse - dual).sub_(values).mul_(rho).sub_(gradient)
        direction, norm = residual.clone(), torch.linalg.vecdot(residual, residual)
        for _ in range(ADMM_STEPS):
            product = direction @ problem.gram
            curvature = torch.linalg.vecdot(direction, product + rho * direction)
            length = torch.where(curvature > 0, norm / curvature, 0.0)[:, None]
            values.addcmul_(direction, length)
            gradient.addcmul_(product, length)
            residual.addcmul_(product.add_(direction, alpha=rho), length, value=-1.0)
            fresh = torch.linalg.vecdot(residual, residual)
            direction.mul_((fresh / norm.clamp_min(torch.finfo(norm.dtype).tiny))[:, None]).add_(residual)
            norm = fresh
        dual.add_(values)
        sparse = _project(problem, dual)
        dual.sub_(sparse)
        rho *= ADMM_GROWTH
    return sparse


def _project(problem: _Problem, values: Tensor) -> Tensor:
    """The nearest (out, in) values of the structure."""
    if problem.structure == "unstructured":
        size = values.abs()
        return values * (size > _thresholds(problem, size)[:, None])
    quads = values.abs().view(values.shape[0], -1, 4)
    beaten = torch.zeros(quads.shape, dtype=torch.int8)
    for i in range(4):
        for j in range(i + 1, 4):
            less = quads[..., i] < quads[..., j]
            beaten[..., i] += less
            beaten[..., j] += ~less
    return values * (beaten < 2).view(values.shape)


def _guard(
    weight: Tensor, mask: Tensor, gram: Tensor, refined: Tensor, keep: Tensor, layers: list[slice] | None
) -> tuple[Tensor, Tensor, Refinement]:
    """The refined rows (of ``layers``: layers) whose output error is not above the given mask's, and the report."""
    pruned = weight * mask
    after, energy = output_error(refined, weight, gram)
    before = torch.linalg.vecdot(pruned - weight, (pruned - weight) @ gram.float()).clamp_min_(0.0)
    better = torch.ones_like(after, dtype=torch.bool) if layers is not None else after <= before
    for rows in layers or []:
        better[rows] = bool(after[rows].sum() <= before[rows].sum())
    refined = torch.where(better[:, None], refined, pruned)
    keep = torch.where(better[:, None], keep, mask)
    after = torch.where(better, after, before)
    report = Refinement(
        error_before=relative_error(before, energy),
        error_after=relative_error(after, energy),
        sparsity=1.0 - float(keep.float().mean()),
        moved=float((keep != mask).float().mean()),
        row_error_before=before,
        row_error=after,
        row_energy=energy,
    )
    return refined, keep, report
