"""Refinement (mask search): the mask moved together with the weights, for every preset but `fixed_mask`.

A mask chosen by scores ignores that the weights which stay can make up for those that go. Refinement minimises

    min_W ‖(W − W₀)X‖²_F + δ‖W − W₀‖²_F    subject to    two non-zeros in every aligned four, or a share of all,

by coordinate descent in the variables `V = W·s`, `s = diag(G + δI)^½`, where the quadratic's diagonal is one (see
`kernels.mask_descent`). It begins at the dense weights, which have no error. In the first sweep every group of four
takes its best pair. It knows what the groups before it lost, and makes up for that. (This is SparseGPT's principle,
Frantar and Alistarh 2023, without the inverse that SparseGPT needs.) In the first `rounds` sweeps what goes is not
dropped but halved each time, so that the pairs are chosen against a row that is dense, then less so. The last `sweeps`
drop it, move the pairs on, and end with weights that are almost optimal for their mask. All work is matrix products and
small tiles. The objective of the last sweeps cannot rise.

Descent or ADMM. ALPS-style ADMM (Meng et al. 2024, arXiv 2406.07831) keeps the row dense for longer and finds better
masks, at three matrix products a round (conjugate gradients for its inner solve). With `method="admm"` its mask and
values are the start of the descent, which then needs no `rounds` of its own. In a trial at 2:4, perplexity was 20.6
dense and 73.5 for recovery on a fixed mask. Descent alone gave 65.8, and 10 rounds of ADMM, then 3 sweeps, gave 62.0 in
about twice the time.

Damping `δ` is in units of the mean energy. More than 0.01 lowers the layers' error on held-out text (least at 0.2 to
0.3) but not the perplexity of the model (65.8 at 0.01, 66.4 at 0.1 in a trial at 2:4).

Unstructured. Each layer has one threshold on what keeping a weight gains. After every sweep it is set to the score that
the wanted share exceeds. That score is found by counting, without a sort, and the sparsity is met exactly but for ties.

Silent inputs, whose energy (second moment) is zero. Damping gives them a small one, so that among them the largest
weights stay, unchanged. Without damping `SILENT` does. Where all inputs are silent (no calibration token reached the
layer), there is no error to lower: the given mask stands, and the weights that it keeps are unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hwpq_pipeline.compression.recovery import RowErrors, check_problem, normalised_gram, output_error
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import mask_descent

STRUCTURES = ("2of4", "unstructured")
METHODS = ("descent", "admm")
SHRINK = 0.5
ROW_TILE = 1024
ADMM_RHO, ADMM_GROWTH, ADMM_STEPS = 0.3, 1.2, 3
#: A silent input's energy where there is no damping, in units of the mean: too small to take a live input's place.
SILENT = 1e-6


@dataclass(frozen=True)
class MaskSearch:
    """How the mask is searched.

    Attributes:
        structure: `2of4`, or `unstructured`, which keeps as many weights of each layer as the given mask.
        method: `descent`, or `admm` for ADMM's mask as the descent's start.
        rounds: sweeps in which what goes is halved; with `admm`, ADMM's rounds.
        sweeps: sweeps after that, with what goes gone; at least one (unstructured: the mask stands in the last half).
        damping: added to the diagonal, in units of its mean.
    """

    structure: str
    method: str
    rounds: int
    sweeps: int
    damping: float


@dataclass(frozen=True)
class Refined:
    """What a refinement returned.

    Attributes:
        weight: (out, in) float32, exactly zero outside the mask.
        mask: (out, in) bool, True where a weight is kept.
        errors: of every row; `before` is that of the given mask alone.
    """

    weight: Tensor
    mask: Tensor
    errors: RowErrors

    def to(self, device: torch.device) -> Refined:
        """The same on a device."""
        return Refined(self.weight.to(device), self.mask.to(device), self.errors.to(device))


def refine_mask(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    search: MaskSearch,
    *,
    layer_rows: Sequence[int] | None = None,
    where: str = "refinement",
) -> Refined:
    """Weights and mask whose outputs are nearest the dense layer's.

    Args:
        weight: (out, in) the dense weight; layers that read the same input may be stacked.
        mask: (out, in) bool, the mask to start from. It is ADMM's first one. The result falls back on it where it is
            not better: row by row for 2of4, else layer by layer.
        gram: (in, in) Σ x xᵀ over the calibration tokens.
        search: how.
        layer_rows: rows of each stacked layer, for `unstructured`; None for one layer.
        where: the layer's name, for errors.

    Raises:
        HwpqError: shapes that do not match, values that are not finite, columns that do not divide by four,
            or an unknown structure or method.
    """
    check_problem(weight, gram, mask, where)
    heights = [weight.shape[0]] if layer_rows is None else list(layer_rows)
    _check_search(search, weight, heights, where)
    work = partial(_refine, search=search, layers=_slices(heights))
    return mask_descent.on_kernel_device(work, weight, mask, gram)


def _refine(weight: Tensor, mask: Tensor, gram: Tensor, *, search: MaskSearch, layers: list[slice]) -> Refined:
    """`refine_mask` of a sound problem, on the kernels' device."""
    weight = weight.float()
    if not bool(gram.diagonal().any()):
        nothing = weight.new_zeros(weight.shape[0])
        return Refined(weight * mask, mask, RowErrors(nothing, nothing, nothing))
    scaled, root = _scaled_gram(gram, search.damping)
    kept = [int(mask[rows].sum()) for rows in layers]
    problem = _Problem(weight * root, scaled, search.structure, layers, kept)
    if search.method == "admm":
        values, keep = _descend(problem, _admm(problem, search.rounds), 0, search.sweeps)
    else:
        values, keep = _descend(problem, None, search.rounds, search.sweeps)
    del problem, scaled  # as large as all that follows
    refined = values.div_(root).mul_(keep)
    return _guard(weight, mask, gram, refined, keep, layers if search.structure == "unstructured" else None)


def _scaled_gram(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Ĝ (in, in) with ones on its diagonal, also where an input is silent, and `s` (in,)."""
    scaled, root, _ = normalised_gram(gram, damping)
    silent = scaled.diagonal() == 0
    if bool(silent.any()):
        scaled.diagonal()[silent] = 1.0
        root = torch.where(silent, (SILENT * gram.diagonal().double().mean()).sqrt().to(root.dtype), root)
    return scaled, root


@dataclass(frozen=True)
class _Problem:
    """The search in the scaled variables.

    Attributes:
        target: (out, in) V₀.
        gram: (in, in) Ĝ.
        structure: see `MaskSearch`.
        layers: for `unstructured`, each layer's rows.
        kept: for `unstructured`, how many of each layer's weights stay.
    """

    target: Tensor
    gram: Tensor
    structure: str
    layers: list[slice]
    kept: list[int]


def _check_search(search: MaskSearch, weight: Tensor, heights: list[int], where: str) -> None:
    if search.structure not in STRUCTURES:
        raise HwpqError(
            f"unknown structure {search.structure!r}", where=where, remedy=f"Choose one of {', '.join(STRUCTURES)}."
        )
    if search.method not in METHODS:
        raise HwpqError(
            f"unknown refinement {search.method!r}", where=where, remedy=f"Choose one of {', '.join(METHODS)}."
        )
    if search.structure == "2of4" and weight.shape[1] % 4:
        raise HwpqError(
            f"{weight.shape[1]} columns do not divide into groups of four",
            where=where,
            remedy="Leave this layer as it is (`ignore` in the variant), or choose an unstructured variant.",
        )
    if sum(heights) != weight.shape[0]:
        raise HwpqError(
            f"layers of {heights} rows do not make {weight.shape[0]}", where=where, remedy="Pass every layer's rows."
        )


def _slices(heights: list[int]) -> list[slice]:
    ends = torch.tensor(heights).cumsum(0).tolist()
    return [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]


def _descend(problem: _Problem, start: Tensor | None, rounds: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Values and keep-mask (out, in) after the sweeps, from `start` (changed in place) or, if None, the target."""
    values = problem.target.clone() if start is None else start
    keep = torch.ones(values.shape, dtype=torch.bool)
    shrinks = [SHRINK] * rounds + [0.0] * max(sweeps, 1)
    state_of = partial(_state, problem, values, keep, dense=start is None)
    if problem.structure == "2of4":
        inverses = mask_descent.pair_inverses(problem.gram)
        for first in range(0, values.shape[0], ROW_TILE):
            state = state_of(slice(first, first + ROW_TILE))
            for shrink in shrinks[:-1]:
                mask_descent.two_of_four(state, inverses, shrink)
            mask_descent.two_of_four(state, inverses, shrinks[-1], last=True)
    else:
        _descend_columns(problem, state_of(slice(None)), shrinks, settling=max(sweeps // 2, 1))
    return values, keep


def _state(problem: _Problem, values: Tensor, keep: Tensor, rows: slice, *, dense: bool) -> mask_descent.State:
    """The state of some rows; at the dense weights the gradient is zero."""
    mine = values[rows]
    gradient = torch.zeros_like(mine) if dense else (mine - problem.target[rows]) @ problem.gram
    return mask_descent.State(mine, keep[rows], gradient, problem.gram)


def _descend_columns(problem: _Problem, state: mask_descent.State, shrinks: list[float], settling: int) -> None:
    """Sweeps over single columns, with new thresholds for each. In the last `settling` of them the mask stands."""
    scores = problem.target.abs()
    for shrink in shrinks[:-settling] or shrinks[:1]:
        mask_descent.columns(state, scores, _thresholds(problem, scores), shrink)
    torch.gt(scores, _thresholds(problem, scores)[:, None], out=state.keep)
    for left in reversed(range(settling)):
        mask_descent.columns(state, scores, None, 0.0, last=left == 0)


def _thresholds(problem: _Problem, scores: Tensor) -> Tensor:
    """(out,) the score that the wanted number of weights in a row's layer exceeds."""
    result = torch.empty(scores.shape[0])
    for rows, kept in zip(problem.layers, problem.kept, strict=True):
        result[rows] = mask_descent.threshold(scores[rows], kept)
    return result


def _admm(problem: _Problem, rounds: int) -> Tensor:
    """Sparse values (out, in) of ADMM: the inner solve by warm-started conjugate gradients.

    `V ← argmin ½ tr((V − V₀)Ĝ(V − V₀)ᵀ) + ρ/2 ‖V − D + U‖²;  D ← projection of V + U;  U ← U + V − D;  ρ ← 1.2 ρ`
    (ALPS, arXiv 2406.07831, equation 5, in the normalised variables).  `(V − V₀)Ĝ` is carried, so that a step is one
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
) -> Refined:
    """The refined rows (or, where `layers` are given, layers) whose error is not above the given mask's; else those."""
    pruned = weight * mask
    after, energy = output_error(refined, weight, gram)
    change = pruned - weight
    before = torch.linalg.vecdot(change, change @ gram.float()).clamp_min_(0.0)
    better = after <= before
    for rows in layers or []:
        better[rows] = bool(after[rows].sum() <= before[rows].sum())
    return Refined(
        weight=torch.where(better[:, None], refined, pruned),
        mask=torch.where(better[:, None], keep, mask),
        errors=RowErrors(before, torch.where(better, after, before), energy),
    )
