"""Recovery (weight update, reconstruction): the best weights that a fixed mask allows, by matrix products alone.

A layer with weight `W₀` (out, in) is pruned by a mask `M`. It should still compute `W₀X`, so the remaining weights
solve the masked least-squares problem

    min_W ‖(W − W₀)X‖²_F + δ‖W − W₀‖²_F    subject to  W = W∘M,        G = XXᵀ  (in, in),   δ = damping·mean(diag G).

Every row is a problem of its own with the same matrix `A = G + δI`, restricted to the row's kept columns. Its normal
equations `((W − W₀)A)∘M = 0` are solved here by conjugate gradients with the Jacobi preconditioner. All rows step
together, so that a step is one (out, in)×(in, in) matrix product, yet each row has its own step lengths. Nothing is
factorized, so nothing can fail on a singular `G`.

Damping guards mildly against overfitting. Stronger damping is worse, because it suppresses inputs with little energy
(second moment): ten times as much lowers the layers' summed relative error on held-out text by 1.3 % and yet costs
3.7 % perplexity. Few steps are better than many: the early steps fit the directions with much energy, which carry over
to other text, and the late ones fit the calibration sample (ALPS, Meng et al. 2024, arXiv 2406.07831, ends with the
same solve).

Layout and cost. With `s = diag(A)^½` the iteration runs in the variables `V = W·s` on `Â = A/(s sᵀ)`, whose diagonal is
one: the preconditioner vanishes and a step needs no division. Only the change `W − W₀∘M` is carried, so what never
changes stays exact to the bit. Rows are taken in tiles that keep a step's operands in a CPU's last-level cache. The
product of the step direction with `Â` also moves the output gradient `(W − W₀)A`, which gives the error after the solve
without a further product. In all there are steps + 2 products (one for the start, one for ‖W₀X‖²).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

#: Rows at a time: on the CPU so many that the operands stay in the last-level cache, on a GPU what fills it.
ROW_TILE, ROW_TILE_CUDA = 512, 16384

#: A row stops once its preconditioned gradient norm has fallen by this factor.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class RowErrors:
    """Squared output errors of a layer's rows, before and after a step. They are not divided by the token count.

    Attributes:
        before: (out,) ‖(w₀∘m − w₀)X‖² of each row with the given mask alone.
        after: (out,) ‖(w − w₀)X‖² of each row with the weights that the step returns.
        energy: (out,) ‖w₀X‖² of each row.
    """

    before: Tensor
    after: Tensor
    energy: Tensor

    @property
    def relative_before(self) -> float:
        """‖(W₀∘M − W₀)X‖²_F / ‖W₀X‖²_F of all rows."""
        return relative_error(self.before, self.energy)

    @property
    def relative_after(self) -> float:
        """‖(W − W₀)X‖²_F / ‖W₀X‖²_F of all rows."""
        return relative_error(self.after, self.energy)

    def to(self, device: torch.device) -> RowErrors:
        """The same numbers on a device."""
        return RowErrors(self.before.to(device), self.after.to(device), self.energy.to(device))


@dataclass(frozen=True)
class Recovered:
    """What a recovery returned.

    Attributes:
        weight: (out, in) float32, exactly zero outside the mask.
        errors: of every row; none is higher after than before.
        steps: conjugate-gradient steps taken (the most of any row tile).
    """

    weight: Tensor
    errors: RowErrors
    steps: int


def relative_error(row_error: Tensor, row_energy: Tensor) -> float:
    """Σ errors / Σ energies of some rows; 0 where the output is nothing but zeros."""
    energy = float(row_energy.double().sum())
    return float(row_error.double().sum()) / energy if energy > 0.0 else 0.0


def output_error(weight: Tensor, original: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared output error and output energy of every row: two matrix products.

    Args:
        weight: (out, in) the compressed weight.
        original: (out, in) the dense one.
        gram: (in, in) Σ x xᵀ over tokens.

    Returns:
        (out,) ‖(w − w₀)X‖² and (out,) ‖w₀X‖², not normalised by the token count.
    """
    return squared_error(weight.float() - original.float(), gram.float()), squared_error(original.float(), gram.float())


def squared_error(change: Tensor, gram: Tensor) -> Tensor:
    """(out,) ‖dX‖² of every row d of a change (out, in) of the weight: one matrix product."""
    return ((change @ gram) * change).sum(1).clamp_min_(0.0)


def check_problem(weight: Tensor, gram: Tensor, mask: Tensor | None, where: str) -> None:
    """Refuse a problem that has no solution: shapes that do not belong together, or values that are not finite.

    Args:
        weight: (out, in).
        gram: (in, in).
        mask: (out, in), or None.
        where: the layer's name, for errors.

    Raises:
        HwpqError: one of these.
    """
    features = weight.shape[-1]
    if weight.dim() != 2 or gram.shape != (features, features) or (mask is not None and mask.shape != weight.shape):
        shapes = f"weight {tuple(weight.shape)}, Gram {tuple(gram.shape)}"
        shapes += "" if mask is None else f", mask {tuple(mask.shape)}"
        raise HwpqError(
            f"shapes do not belong together: {shapes}",
            where=where,
            remedy="Recompute the statistics for this model.",
        )
    if not _finite(weight):
        raise HwpqError(
            "the weight holds values that are not finite",
            where=where,
            remedy="The checkpoint is damaged; fetch it again.",
        )
    diagonal = gram.diagonal()
    if not _finite(gram) or bool((diagonal < 0).any()):
        raise HwpqError(
            "the Gram matrix holds values that are not finite, or a negative energy",
            where=where,
            remedy="Recompute the statistics, in float32 if they were collected in less.",
        )


def _finite(values: Tensor) -> bool:
    """Whether all are numbers. One sum tells, ten times faster than a look at each, unless the sum overflows."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def damped_diagonal(gram: Tensor, damping: float) -> tuple[float, Tensor]:
    """δ = damping·mean(diag G), and the (in,) diagonal of G + δI with ones where that is zero."""
    diagonal = gram.diagonal().float()
    delta = damping * float(diagonal.double().mean())
    damped = diagonal + delta
    return delta, torch.where(damped > 0, damped, torch.ones_like(damped))


def normalised_gram(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """`Â = (G + δI)/(s sᵀ)` (in, in) with ones on its diagonal, `s` (in,), and δ."""
    delta, damped = damped_diagonal(gram, damping)
    root = damped.sqrt()
    scaled = gram.float() / root
    scaled /= root[:, None]
    scaled.diagonal().add_(delta / damped)
    return scaled, root, delta


def recover(
    weight: Tensor, mask: Tensor, gram: Tensor, *, steps: int, damping: float, where: str = "recovery"
) -> Recovered:
    """The weights on `mask` whose outputs are nearest the dense layer's.

    Rows of several layers may be stacked when the layers read the same input.

    Args:
        weight: (out, in) the dense weight.
        mask: (out, in) bool, True where a weight is kept.
        gram: (in, in) Σ x xᵀ over the calibration tokens.
        steps: conjugate-gradient steps at most; 0 leaves the mask alone.
        damping: added to the diagonal, in units of its mean.
        where: the layer's name, for errors.

    Raises:
        HwpqError: shapes that do not match, or values that are not finite.

    Source: Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 9.1; the rows are systems side by side.
    """
    check_problem(weight, gram, mask, where)
    scaled, root, delta = normalised_gram(gram, damping)
    system = _System(scaled, root, delta / root.square())
    weight = weight.float()
    result = torch.empty_like(weight)
    before, after, energy = (torch.empty(weight.shape[0], device=weight.device) for _ in range(3))
    taken = 0
    for rows in even_tiles(weight.shape[0], ROW_TILE_CUDA if weight.is_cuda else ROW_TILE):
        solved, count = _solve_rows(system, weight[rows], mask[rows], steps, out=result[rows])
        before[rows], after[rows], energy[rows] = solved.before, solved.after, solved.energy
        taken = max(taken, count)
    return Recovered(result, RowErrors(before, after, energy), taken)


@dataclass(frozen=True)
class _System:
    """The normalised quadratic.

    Attributes:
        gram: (in, in) Â.
        root: (in,) s.
        shrink: (in,) δ/s², the damping's share of Â's diagonal.
    """

    gram: Tensor
    root: Tensor
    shrink: Tensor

    def squared_error(self, change: Tensor, gradient: Tensor) -> Tensor:
        """(rows,) errors from the change V and VÂ (both (rows, in)), the damping taken out again."""
        return (torch.linalg.vecdot(change, gradient) - change.square() @ self.shrink).clamp_min_(0.0)


def even_tiles(rows: int, most: int) -> Iterator[slice]:
    """Ranges of at most so many rows, all of one size but the last.

    A last tile of few rows is multiplied by another routine, whose sums were seen to differ by a bit from one process
    to the next. So the rows are divided evenly.
    """
    tiles = max(1, -(-rows // most))
    tile = max(1, -(-rows // tiles))
    for start in range(0, rows, tile):
        yield slice(start, start + tile)


def _solve_rows(system: _System, weight: Tensor, mask: Tensor, steps: int, *, out: Tensor) -> tuple[RowErrors, int]:
    """Solve some rows into `out` (rows, in): their errors, and the steps taken. A row that did not gain stays."""
    keep = mask.to(weight.dtype)
    dense = weight * system.root
    energy = system.squared_error(dense, dense @ system.gram)
    pruned = dense * (keep - 1.0)
    gradient = pruned @ system.gram
    before = system.squared_error(pruned, gradient)
    change, count = conjugate_gradients(system.gram, keep, gradient, steps, TOLERANCE)
    after = system.squared_error(pruned + change, gradient)
    better = after < before
    change = change.div_(system.root).mul_(better[:, None])
    torch.add(weight * keep, change, out=out)
    return RowErrors(before, torch.where(better, after, before), energy), count


def conjugate_gradients(
    scaled: Tensor, keep: Tensor, gradient: Tensor, steps: int, tolerance: float
) -> tuple[Tensor, int]:
    """Solve `(change·Â + gradient)∘keep = 0` for every row, in the normalised weights.

    Args:
        scaled: (in, in) Â.
        keep: (rows, in), or a shape that broadcasts to it: ones where a weight may change.
        gradient: (rows, in) the output gradient before any change; updated in place.
        steps: at most.
        tolerance: a row stops once its gradient norm has fallen by this factor.

    Returns:
        The change (rows, in), and the steps taken.
    """
    change = torch.zeros_like(gradient)
    residual = -gradient * keep
    direction = residual.clone()
    norm = torch.linalg.vecdot(residual, residual)
    floor = norm * tolerance**2
    for step in range(steps):
        active = norm > floor
        if not bool(active.any()):
            return change, step
        product = direction @ scaled
        curvature = torch.linalg.vecdot(direction, product)
        length = torch.where(active & (curvature > 0), norm / curvature, 0.0)[:, None]
        change.addcmul_(direction, length)
        gradient.addcmul_(product, length)
        residual.addcmul_(product.mul_(keep), length, value=-1.0)
        fresh = torch.linalg.vecdot(residual, residual)
        direction.mul_((fresh / norm.clamp_min(torch.finfo(norm.dtype).tiny))[:, None]).add_(residual)
        norm = fresh
    return change, steps
