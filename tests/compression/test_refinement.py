"""Refinement against exhaustive search over masks with numpy.linalg.lstsq for the weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.recovery import recover
from hwpq_pipeline.compression.refinement import MaskSearch, refine_mask
from hwpq_pipeline.errors import HwpqError

QUICK = MaskSearch("2of4", "descent", rounds=4, sweeps=4, damping=0.01)


def problem(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs (tokens, columns) with strong correlations, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs + 1.5 * torch.randn(tokens, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs, inputs.T @ inputs


def wanda(weight: Tensor, gram: Tensor) -> Tensor:
    """2:4 mask by |w|·‖x‖, with a sort."""
    scores = (weight.abs() * gram.diagonal().sqrt()).view(weight.shape[0], -1, 4)
    return (scores.argsort(2).argsort(2) >= 2).view(weight.shape)


def half(weight: Tensor, gram: Tensor) -> Tensor:
    scores = weight.abs() * gram.diagonal().sqrt()
    return scores > scores.flatten().median()


def error_by_tokens(weight: Tensor, original: Tensor, inputs: Tensor) -> np.ndarray:
    change = weight.double().numpy() - original.double().numpy()
    return ((inputs.double().numpy() @ change.T) ** 2).sum(0)


def best_by_exhaustion(row: np.ndarray, inputs: np.ndarray, masks: list[list[int]]) -> float:
    """Least squared output error over all masks, each with its least-squares weights."""
    wanted = inputs @ row
    errors = []
    for kept in masks:
        solution = np.linalg.lstsq(inputs[:, kept], wanted, rcond=None)[0]
        errors.append(((inputs[:, kept] @ solution - wanted) ** 2).sum())
    return min(errors)


PAIRS = list(itertools.combinations(range(4), 2))
MASKS_2OF4 = [[*a, *(4 + j for j in b), *(8 + j for j in c)] for a, b, c in itertools.product(PAIRS, repeat=3)]


@pytest.mark.parametrize("method", ["descent", "admm"])
def test_close_to_the_exhaustive_optimum_of_2of4(method: str) -> None:
    weight, inputs, gram = problem(12, 12)
    mask = wanda(weight, gram)
    search = MaskSearch("2of4", method, rounds=20, sweeps=20, damping=1e-4)
    found = refine_mask(weight, mask, gram, search)
    refined, keep = found.weight, found.mask
    best = np.array([best_by_exhaustion(row, inputs.double().numpy(), MASKS_2OF4) for row in weight.double().numpy()])
    mine = error_by_tokens(refined, weight, inputs)
    fixed = error_by_tokens(recover(weight, mask, gram, steps=40, damping=1e-4).weight, weight, inputs)
    assert (mine >= best * (1 - 1e-3)).all()
    assert mine.sum() <= 1.25 * best.sum()
    assert mine.sum() < 0.9 * fixed.sum()
    assert bool((keep.view(12, 3, 4).sum(2) == 2).all())
    assert bool((refined[~keep] == 0).all())
    np.testing.assert_allclose(found.errors.after.numpy(), mine, rtol=1e-2)


@pytest.mark.parametrize("method", ["descent", "admm"])
def test_better_than_recovery_of_a_fixed_mask_when_unstructured(method: str) -> None:
    weight, inputs, gram = problem(24, 32, 1)
    mask = half(weight, gram)
    search = MaskSearch("unstructured", method, rounds=20, sweeps=20, damping=1e-4)
    found = refine_mask(weight, mask, gram, search)
    refined, keep = found.weight, found.mask
    fixed = error_by_tokens(recover(weight, mask, gram, steps=40, damping=1e-4).weight, weight, inputs)
    mine = error_by_tokens(refined, weight, inputs)
    assert mine.sum() < 0.92 * fixed.sum()
    assert int(keep.sum()) == int(mask.sum())
    assert bool((refined[~keep] == 0).all())
    energy = error_by_tokens(0 * weight, weight, inputs).sum()
    assert found.errors.relative_after == pytest.approx(mine.sum() / energy, rel=1e-3)


def test_each_stacked_layer_keeps_as_many_weights_as_its_mask() -> None:
    weight, _, gram = problem(30, 32, 4)
    weight[10:] *= 20.0  # one threshold for both layers would prune the first away
    mask = torch.zeros(30, 32, dtype=torch.bool)
    mask[:10, ::4], mask[10:, ::2] = True, True
    mask[3, 1] = mask[17, 1] = True
    found = refine_mask(weight, mask, gram, replace(QUICK, structure="unstructured"), layer_rows=[10, 20])
    assert int(found.mask[:10].sum()) == 10 * 8 + 1
    assert int(found.mask[10:].sum()) == 20 * 16 + 1
    assert found.errors.relative_after < 0.5 * found.errors.relative_before


def test_no_row_gets_worse_on_the_tokens_themselves() -> None:
    weight, inputs, gram = problem(40, 24, tokens=5)
    mask = wanda(weight, gram)
    found = refine_mask(weight, mask, gram, MaskSearch("2of4", "descent", rounds=0, sweeps=1, damping=10.0))
    before, after = error_by_tokens(weight * mask, weight, inputs), error_by_tokens(found.weight, weight, inputs)
    energy = error_by_tokens(0 * weight, weight, inputs)
    assert (after <= before + 1e-5 * energy).all()
    assert found.errors.relative_after <= found.errors.relative_before


@pytest.mark.parametrize("structure", ["2of4", "unstructured"])
def test_dead_and_silent_inputs(structure: str) -> None:
    weight, inputs, _ = problem(6, 16)
    inputs[:, 4:8] = 0.0
    for gram in (inputs.T @ inputs, torch.zeros(16, 16)):
        found = refine_mask(weight, wanda(weight, gram + 1e-9), gram, replace(QUICK, structure=structure))
        assert bool(torch.isfinite(found.weight).all())
        assert int(found.mask.sum()) == found.mask.numel() // 2
        assert bool((found.weight[~found.mask] == 0).all())


@pytest.mark.parametrize("method", ["descent", "admm"])
@pytest.mark.parametrize("structure", ["2of4", "unstructured"])
def test_a_layer_that_no_token_reached_keeps_its_mask_and_weights(structure: str, method: str) -> None:
    weight, _, gram = problem(6, 16)
    mask = wanda(weight, gram)
    for damping in (0.0, 0.01):
        search = replace(QUICK, structure=structure, method=method, damping=damping)
        found = refine_mask(weight, mask, torch.zeros(16, 16), search)
        assert torch.equal(found.mask, mask)
        assert torch.equal(found.weight, torch.where(mask, weight, 0.0))
        assert (found.errors.relative_before, found.errors.relative_after) == (0.0, 0.0)


@pytest.mark.parametrize("method", ["descent", "admm"])
@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
def test_silent_inputs_beside_live_ones_keep_their_largest_weights(method: str, damping: float) -> None:
    weight, inputs, _ = problem(6, 16)
    inputs[:, 4:8] = 0.0
    gram = inputs.T @ inputs
    found = refine_mask(weight, wanda(weight, gram + 1e-9), gram, replace(QUICK, method=method, damping=damping))
    silent = weight[:, 4:8]
    largest = silent.abs() >= silent.abs().sort(1).values[:, 2:3]
    assert torch.equal(found.mask[:, 4:8], largest)
    torch.testing.assert_close(found.weight[:, 4:8], torch.where(largest, silent, 0.0))
    assert found.errors.relative_after < found.errors.relative_before


@pytest.mark.parametrize(
    ("search", "heights", "message"),
    [
        (replace(QUICK, structure="1of4"), None, "layer.7.*1of4.*2of4, unstructured"),
        (replace(QUICK, method="luck"), None, "layer.7.*luck.*descent, admm"),
        (QUICK, [1, 2], r"layer.7.*\[1, 2\] rows do not make 4"),
    ],
)
def test_refusals_name_layer_and_remedy(search: MaskSearch, heights: list[int] | None, message: str) -> None:
    weight, _, gram = problem(4, 8)
    with pytest.raises(HwpqError, match=message):
        refine_mask(weight, wanda(weight, gram), gram, search, layer_rows=heights, where="layer.7")


def test_refuses_columns_that_do_not_divide_by_four_and_values_that_are_not_finite() -> None:
    weight, _, gram = problem(4, 10)
    with pytest.raises(HwpqError, match=r"layer.7.*10 columns"):
        refine_mask(weight, weight > 0, gram, QUICK, where="layer.7")
    gram[0, 0] = float("inf")
    with pytest.raises(HwpqError, match=r"layer.7.*not finite"):
        refine_mask(weight[:, :8], weight[:, :8] > 0, gram[:8, :8], QUICK, where="layer.7")
