"""The kernel, and the readable version, against exhaustive search over the codes with the error of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.kernels.coordinate_descent import Walk, blocks, descend, reference
from hwpq_pipeline.kernels.stored import Stored

Array = np.ndarray[Any, np.dtype[np.float64]]
INT4 = Walk(low=-8.0, high=7.0, sweeps=2, refit=True)
FP4 = Walk(low=-12.0, high=12.0, sweeps=2, refit=True, coarsening=True)
HALVES = np.array([-12.0, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12])

#: Of a step: so near a midpoint between two codes either may be right (`TIE` and what float32 rounds off).
NEAR = 3e-4


@dataclass(frozen=True)
class Problem:
    """A weight to round, where its codes begin, and the inputs (tokens, columns) whose Gram matrix counts."""

    codes: Tensor
    scale: Tensor
    weight: Tensor
    inputs: Array

    @property
    def gram(self) -> Tensor:
        return torch.from_numpy(self.inputs.T @ self.inputs).float()

    def begin(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.weight, self.gram

    def errors(self, codes: Tensor, scale: Tensor) -> Array:
        """(rows,) ½ ‖X(q − w₀)‖² from the inputs, in float64."""
        size = codes.shape[1] // scale.shape[1]
        values = codes.double().numpy() * np.repeat(scale.double().numpy(), size, axis=1)
        result: Array = 0.5 * np.square((values - self.weight.double().numpy()) @ self.inputs.T).sum(1)
        return result


def problem(rows: int, columns: int, groups: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs + torch.randn(4 * columns, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) * 0.2 + 0.2
    codes = (weight / scale.repeat_interleave(columns // groups, 1)).round().clamp(-8, 7).to(torch.int8)
    return Problem(codes, scale, weight, inputs.double().numpy() / columns**0.5)


def on_halves(codes: Tensor) -> Tensor:
    near = np.abs(codes.numpy()[..., None] - HALVES).argmin(-1)
    return torch.from_numpy(HALVES[near]).to(torch.int8)


def by_exhaustion(given: Problem, mask: Tensor | None, walk: Walk) -> tuple[Array, Array, list[int]]:
    """A walk that tries every code of a column on the inputs and keeps the best.

    Returns:
        Codes, scales, and the rows that never came `NEAR` a tie: theirs are the only right codes.
    """
    decided = set(range(len(given.codes)))
    codes, scale = given.codes.double().numpy().copy(), given.scale.double().numpy().copy()
    target, size = given.weight.double().numpy(), codes.shape[1] // scale.shape[1]
    levels = HALVES if walk.coarsening else np.arange(walk.low, walk.high + 1)
    for row, _, group in product(range(codes.shape[0]), range(walk.sweeps), range(scale.shape[1])):
        ours = slice(group * size, (group + 1) * size)
        for column in range(codes.shape[1])[ours]:
            if mask is not None and not mask[row, column]:
                continue
            missing = given.inputs @ (codes[row] * np.repeat(scale[row], size) - target[row])
            moves = scale[row, group] * (levels - codes[row, column])
            trials = np.square(missing[:, None] + given.inputs[:, column, None] * moves).sum(0)
            codes[row, column] = levels[trials.argmin()]
            best, second = np.sort(trials)[:2]  # two neighbours on a parabola: their difference tells the midpoint
            if second - best < 2 * NEAR * np.square(given.inputs[:, column] * scale[row, group]).sum():
                decided.discard(row)
        if walk.refit and codes[row, ours].any():
            others = codes[row] * np.repeat(scale[row], size)
            others[ours] = 0.0
            wanted = given.inputs @ (target[row] - others)
            direction = given.inputs[:, ours] @ codes[row, ours]
            scale[row, group] = np.linalg.lstsq(direction[:, None], wanted, rcond=None)[0][0]
    return codes, scale, sorted(decided)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 4, 1), (3, 33, 3), (5, 64, 2), (2, 96, 1), (3, 130, 13), (2, 128, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [INT4, FP4], ids=["int4", "fp4"])
def test_every_code_is_the_best_of_all(
    kind: Walk, rows: int, columns: int, groups: int, masked: bool, refit: bool
) -> None:
    given, walk, mask = problem(rows, columns, groups, seed=rows * columns), replace(kind, refit=refit), None
    if kind.coarsening:
        given = replace(given, codes=on_halves(given.codes))
    if masked:
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.6
        given = replace(given, codes=given.codes * mask)
    codes, scale, decided = by_exhaustion(given, mask, walk)
    assert 2 * len(decided) >= rows
    found = descend(*given.begin(), mask, walk)
    slow_codes, slow_scale = reference.descend(*given.begin(), mask, walk)
    for some_codes, some_scale in ((found.codes, found.scale), (slow_codes, slow_scale)):
        assert np.array_equal(some_codes.double().numpy()[decided], codes[decided])
        np.testing.assert_allclose(some_scale.numpy()[decided], scale[decided], rtol=1e-4)
    np.testing.assert_allclose(found.before.numpy(), given.errors(given.codes, given.scale), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.after.numpy(), given.errors(found.codes, found.scale), rtol=1e-3, atol=1e-5)
    assert bool((found.after <= found.before * (1 + 1e-6)).all())
    if mask is not None:
        assert bool((found.codes[~mask] == 0).all())


@pytest.mark.parametrize("correlated", [False, True])
def test_the_walk_ends_at_the_best_code_of_each_column(correlated: bool) -> None:
    """Without correlation each column is a problem of its own, and this is the best of all code vectors."""
    given = problem(3, 5, 1, seed=7)
    given = replace(given, codes=given.codes.clamp(-4, 3))
    if not correlated:
        given = replace(given, inputs=np.diag(np.sqrt(np.square(given.inputs).sum(0))))
    found = descend(*given.begin(), None, Walk(low=-4.0, high=3.0, sweeps=20, refit=False))
    reached = given.errors(found.codes, found.scale)
    every = np.array(list(product(range(-4, 4), repeat=5)), dtype=np.float64)
    for row in range(3):
        change = every * float(given.scale[row, 0]) - given.weight[row].double().numpy()
        errors = 0.5 * np.square(change @ given.inputs.T).sum(1)
        beside = (every != found.codes[row].double().numpy()).sum(1) <= 1
        assert reached[row] <= errors[beside].min() * (1 + 1e-4)
        assert reached[row] >= errors.min() * (1 - 1e-6)
        assert correlated or reached[row] <= errors.min() * (1 + 1e-4)
    assert (reached <= given.errors(given.codes, given.scale)).all()


def test_wide_groups_keep_their_scale() -> None:
    given = problem(2, 2 * blocks.WIDEST_REFIT, 1, seed=3)
    found = descend(*given.begin(), None, replace(INT4, sweeps=1))
    assert torch.equal(found.scale, given.scale)
    assert bool((found.after < found.before).all())


@pytest.mark.parametrize(
    ("columns", "size"), [(1, 1), (7, 7), (100, 25), (64, 16), (576, 64), (576, 32), (1536, 128), (1536, 1536), (33, 3)]
)
def test_blocks_cover_the_columns_in_whole_groups(columns: int, size: int) -> None:
    block = blocks.block_columns(columns, size)
    assert columns % block == 0
    assert block % size == 0 or (size > blocks.WIDEST_REFIT and size % block == 0)


@pytest.mark.parametrize("kind", [INT4, FP4], ids=["int4", "fp4"])
@pytest.mark.parametrize(
    ("mantissa", "wanted"), [(3, torch.float8_e4m3fn), (0, torch.float8_e8m0fnu)], ids=["e4m3", "e8m0"]
)
def test_scales_of_a_few_bits_are_torchs_own(kind: Walk, mantissa: int, wanted: torch.dtype) -> None:
    given = problem(4, 32, 2, seed=9)
    given = replace(given, codes=on_halves(given.codes), scale=given.scale.to(wanted).float())
    found = descend(*given.begin(), None, replace(kind, sweeps=3, stored=Stored(mantissa, 2.0**-6, 448.0)))
    assert torch.equal(found.scale.to(wanted).float(), found.scale)
    assert Stored(mantissa, 2.0**-6, 448.0).hold(found.scale)
    assert bool((found.after < found.before).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_numbers_are_the_dtypes_normal_ones(dtype: torch.dtype) -> None:
    numbers, kind = Stored.of(dtype), torch.finfo(dtype)
    given = torch.randn(4096, generator=torch.Generator().manual_seed(1)).abs() + 0.01
    assert numbers.hold(given.to(dtype).float())
    assert numbers.hold(given) == (dtype == torch.float32)
    assert (numbers.least, numbers.most) == (kind.smallest_normal, kind.max)
    assert numbers.hold(torch.tensor([numbers.least, numbers.most]))
    assert not numbers.hold(torch.tensor([numbers.least / 2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_to_the_stored_type(dtype: torch.dtype) -> None:
    given = problem(4, 32, 2, seed=8)
    given = replace(given, scale=given.scale.to(dtype).float())
    found = descend(*given.begin(), None, replace(INT4, sweeps=3, stored=Stored.of(dtype)))
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    assert not torch.equal(found.scale, given.scale)
    assert bool((found.after < found.before).all())


def test_start_is_left_as_it_was() -> None:
    given = problem(2, 16, 2, seed=4)
    kept = given.codes.clone(), given.scale.clone()
    descend(*given.begin(), None, INT4)
    assert torch.equal(given.codes, kept[0])
    assert torch.equal(given.scale, kept[1])
