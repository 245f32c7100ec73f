"""Rounding against exhaustive search over all codes, and against coordinate-wise optimality."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.codes import dequantize
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.rounding import Descent, quantize
from hwpq_pipeline.errors import HwpqError

SWEEPS, DAMPING = 4, 0.01
DESCENT = Descent(SWEEPS, DAMPING)


def problem(rows: int, columns: int, seed: int = 0, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Weights and the Gram matrix of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs + 1.5 * torch.randn(tokens, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def objective(values: np.ndarray, original: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """(rows,) ½ (q − w₀) G (q − w₀)ᵀ in float64, summed term by term."""
    change = values.astype(np.float64) - original.astype(np.float64)
    total = np.zeros(change.shape[0])
    for i, j in itertools.product(range(change.shape[1]), repeat=2):
        total += 0.5 * change[:, i] * float(gram[i, j]) * change[:, j]
    return total


def exhaustive(original: np.ndarray, gram: np.ndarray, scale: float, low: int, high: int) -> float:
    """The least objective over every code vector of one row at a fixed scale."""
    codes = np.array(list(itertools.product(range(low, high + 1), repeat=original.size)), dtype=np.float64)
    change = scale * codes - original.astype(np.float64)
    return float((0.5 * np.einsum("ni,ij,nj->n", change, gram.astype(np.float64), change)).min())


@pytest.mark.parametrize("seed", range(4))
def test_coordinate_descent_lies_between_the_exhaustive_optimum_and_nearest(seed: int) -> None:
    weight, gram = problem(3, 5, seed)
    found = quantize(weight, "int3", gram=gram, descent=Descent(20, 0.0, refit_scales=False))
    plain = quantize(weight, "int3", gram=gram)
    assert torch.equal(found.scale, plain.scale)
    w, g = weight.numpy(), gram.numpy()
    mine = objective(dequantize(found).numpy(), w, g)
    before = objective(dequantize(plain).numpy(), w, g)
    for row in range(3):
        best = exhaustive(w[row], g, float(found.scale[row, 0]), -4, 3)
        assert best * (1 - 1e-5) <= mine[row] <= before[row] * (1 + 1e-5)


def test_without_correlation_it_is_the_exhaustive_optimum() -> None:
    weight, gram = problem(4, 5, 7)
    gram = torch.diag(gram.diagonal())
    found = quantize(weight, "int3", gram=gram, descent=Descent(SWEEPS, 0.0, refit_scales=False))
    mine = objective(dequantize(found).numpy(), weight.numpy(), gram.numpy())
    for row in range(4):
        best = exhaustive(weight[row].numpy(), gram.numpy(), float(found.scale[row, 0]), -4, 3)
        assert mine[row] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("grid", "group"), [("int4", 16), ("int3", 8), ("int4", None), ("int8", None)])
def test_no_single_code_can_be_improved(grid: str, group: int | None) -> None:
    weight, gram = problem(4, 32, 11)
    found = quantize(weight, grid, group_size=group, gram=gram, descent=Descent(60, 0.0, refit_scales=False))
    w, g, limits = weight.numpy(), gram.numpy(), GRIDS[grid]
    values = dequantize(found).numpy()
    reached = objective(values, w, g)
    for column in range(32):
        step = found.scale[:, column // (group or 32)].numpy()
        for change in (-1, 1):
            moved = values.copy()
            moved[:, column] += change * step
            allowed = np.abs(found.codes[:, column].numpy().astype(int) + change - (limits.low + limits.high) / 2) <= (
                (limits.high - limits.low) / 2
            )
            assert (objective(moved, w, g) >= reached * (1 - 1e-3))[allowed].all()


@pytest.mark.parametrize("grid", ["int4", "int3"])
@pytest.mark.parametrize("masked", [False, True])
def test_never_worse_than_nearest_row_by_row_and_much_better_in_sum(grid: str, masked: bool) -> None:
    weight, gram = problem(24, 64, 3)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5 if masked else None
    pruned = weight if mask is None else weight * mask
    options: dict[str, Any] = {"group_size": 32, "gram": gram, "mask": mask, "original": weight}
    found = quantize(pruned, grid, descent=DESCENT, **options)
    plain = quantize(pruned, grid, **options)
    w, g = weight.numpy(), gram.numpy()
    mine, before = (objective(dequantize(q).numpy(), w, g) for q in (found, plain))
    assert (mine <= before * (1 + 1e-4)).all()
    assert mine.sum() < 0.7 * before.sum()
    if mask is not None:
        assert bool((found.codes[~mask] == 0).all())
        assert bool((plain.codes[~mask] == 0).all())


def test_refitted_scales_help() -> None:
    weight, gram = problem(24, 64, 9)
    errors = []
    for refit in (False, True):
        found = quantize(weight, "int3", group_size=16, gram=gram, descent=Descent(8, DAMPING, refit_scales=refit))
        errors.append(objective(dequantize(found).numpy(), weight.numpy(), gram.numpy()).sum())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_fit_the_type_they_are_stored_in(dtype: torch.dtype) -> None:
    weight, gram = problem(8, 32, 2)
    for descent in (None, DESCENT):
        found = quantize(weight * 0.02, "int4", group_size=16, descent=descent, gram=gram, scale_dtype=dtype)
        assert torch.equal(found.scale.to(dtype).float(), found.scale)


def test_dead_inputs_keep_their_nearest_codes() -> None:
    weight, gram = problem(4, 16, 1)
    gram[5], gram[:, 5] = 0.0, 0.0
    options: dict[str, Any] = {"group_size": 16, "gram": gram}
    found = quantize(weight, "int4", descent=Descent(SWEEPS, DAMPING, refit_scales=False), **options)
    plain = quantize(weight, "int4", **options)
    assert torch.equal(found.codes[:, 5], plain.codes[:, 5])
    nothing = quantize(weight, "int4", descent=DESCENT, group_size=16, gram=torch.zeros(16, 16))
    assert bool(torch.isfinite(nothing.scale).all())


def test_same_codes_whatever_rows_stand_beside() -> None:
    weight, gram = problem(16, 64, 6)
    whole = quantize(weight, "int4", group_size=32, descent=DESCENT, gram=gram)
    part = quantize(weight[3:9], "int4", group_size=32, descent=DESCENT, gram=gram)
    assert (whole.codes[3:9] == part.codes).float().mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "int4", "descent": DESCENT}, "layer.7.*needs the Gram matrix.*gram mode"),
        ({"grid": "fp8_e4m3", "descent": DESCENT}, "layer.7.*Choose nearest"),
        ({"grid": "int5"}, "layer.7.*'int5'"),
        ({"grid": "int4", "group_size": 5}, "layer.7.*16 columns.*groups of 5.*Choose another grid"),
    ],
)
def test_refusals_name_layer_and_remedy(options: dict, message: str) -> None:
    with pytest.raises(HwpqError, match=message):
        quantize(torch.ones(2, 16), where="layer.7", **options)


def test_refuses_weights_that_are_not_finite() -> None:
    weight = torch.ones(2, 16)
    weight[0, 3] = float("nan")
    with pytest.raises(HwpqError, match=r"layer.7.*not finite"):
        quantize(weight, "int8", where="layer.7")
