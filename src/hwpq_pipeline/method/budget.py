"""Sharing out a budget: for each group of layers one of the choices, so that the predicted loss is least.

    min Σ_g loss[g, c_g]    such that    Σ_g cost[g, c_g] ≤ limit,    one choice c_g for each group g

This is the multiple-choice knapsack problem. It is NP-hard in general and easy at this size: SciPy's branch and bound
(HiGHS) proves the optimum of some hundred groups in well under a second. Where it stops earlier, the gap to the bound
is told.

Costs are bytes. A model's size counts what the compressed-tensors export stores, where pruned weights are zeros and
save nothing. The bytes that a token reads count 2:4 layers as the packed export holds them
(`checkpoints.packed`), and the head, but one row only of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.choices import TWO_OF_FOUR
from hwpq_pipeline.method.sections import Choice

_SECONDS = 60.0
_LEAST_BITS = 4  # of a packed code


@dataclass(frozen=True)
class Option:
    """What one group may become.

    Attributes:
        group: its name.
        choice: the choice's name.
        cost: bytes.
        loss: predicted, in any unit.
    """

    group: str
    choice: str
    cost: float
    loss: float


@dataclass(frozen=True)
class Shared:
    """How the budget is shared out.

    Attributes:
        chosen: each group's choice.
        cost: of all groups, bytes.
        loss: of all groups.
        gap: at most so much of the loss could be saved by another sharing, as a share; 0 where this one is the best.
    """

    chosen: Mapping[str, str]
    cost: float
    loss: float
    gap: float


def layer_bytes(shape: tuple[int, int], choice: Choice, *, packed: bool, dense: int) -> int:
    """Bytes of a layer after a choice.

    Args:
        shape: (out, in).
        choice: what is done to it.
        packed: whether the zeros of 2:4 are left out.
        dense: bytes of a number of the dense checkpoint, which scales have too.
    """
    rows, columns = shape
    sparse = choice.selection is not None and choice.selection.structure == TWO_OF_FOUR
    places = 0
    if choice.quantization is not None and GRIDS[choice.quantization.grid].coarsening:
        packed = False  # no packed form
    if packed and sparse:
        places, columns = rows * -(-columns // 8), columns // 2
    if choice.quantization is None:
        return rows * columns * dense + places
    grid, size = GRIDS[choice.quantization.grid], choice.quantization.group_size
    if packed and sparse and size is not None:
        size //= 2  # as many scales as before for half the columns
    if packed and sparse and grid.bits < _LEAST_BITS:
        grid = replace(grid, bits=_LEAST_BITS)
    return grid.bytes_of(rows, columns, size, dense if grid.stored_as == "model" else None) + places


def stored_bytes(layer: Layer, choice: Choice, *, packed: bool, dense: int) -> int:
    """`layer_bytes` of a model's layer. One that transformers reads no codes of is stored by its values."""
    if not packed and not layer.packs:
        choice = Choice(choice.name)
    return layer_bytes(layer.shape, choice, packed=packed, dense=dense)


def table_bytes(shape: tuple[int, int], grid: str | None, dense: int) -> int:
    """Bytes of an embedding or a head (rows, columns) on a grid; None leaves it in the dense checkpoint's dtype."""
    return math.prod(shape) * dense if grid is None else GRIDS[grid].bytes_of(*shape, None, dense)


def tables_bytes(shapes: Sequence[tuple[int, int]], grid: str | None, dense: int) -> int:
    """Bytes of the embedding and the head as exported. A single one is tied, and its scales are there twice."""
    twice = dense * shapes[0][0] if grid is not None and len(shapes) == 1 else 0
    return sum(table_bytes(shape, grid, dense) for shape in shapes) + twice


def share_out(options: Sequence[Option], limit: float, where: str) -> Shared:
    """The choices with the least loss within the limit.

    Args:
        options: every choice of every group.
        limit: of the sum of the costs, bytes.
        where: the variant, for errors.

    Raises:
        HwpqError: even the smallest choices cost more than the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    groups = {name: number for number, name in enumerate(dict.fromkeys(option.group for option in options))}
    costs, losses = (np.array([getattr(option, part) for option in options]) for part in ("cost", "loss"))
    own = np.array([groups[option.group] for option in options])
    smallest = [np.flatnonzero(own == number)[costs[own == number].argmin()] for number in groups.values()]
    least, total = costs[smallest].sum(), losses[smallest].sum()
    if least > limit:
        raise HwpqError(
            f"the smallest choices take {least:,.0f} bytes, and the limit leaves {limit:,.0f} bytes for them",
            where=f"{where}: budget",
            remedy=f"Give the layers {least - limit:,.0f} bytes more, or add a smaller choice.",
        )
    one_each = csr_array((np.ones(len(options)), (own, np.arange(len(options)))))
    # Scaled by what a sharing loses that is already known, so that the solver's tolerances are small beside it. An
    # option that loses more by itself is in no better sharing.
    for _ in range(2):
        unit = max(float(total), np.finfo(np.float64).tiny)
        found = milp(
            np.minimum(losses / unit, 2.0),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / limit, -np.inf, 1)],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise HwpqError(f"no sharing in {_SECONDS:.0f} s", where=where, remedy="Take fewer choices.")
        taken = [option for option, share in zip(options, found.x, strict=True) if share > 0.5]
        total = sum(option.loss for option in taken)
    bound = float(found.mip_dual_bound or 0.0) * unit
    return Shared(
        chosen={option.group: option.choice for option in taken},
        cost=sum(option.cost for option in taken),
        loss=total,
        gap=max(0.0, 1.0 - bound / total) if total > 0 else 0.0,
    )
