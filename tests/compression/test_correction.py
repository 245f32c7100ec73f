"""Correction towards the dense outputs, against dense least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression import correction
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.errors import HwpqError

OUT, IN, TOKENS, DAMPING = 7, 24, 400, 0.01


Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """W₀, X̃ (tokens, in) and T (tokens, out): inputs that are off, and what the dense model gives."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=generator)
    mixing = torch.randn(IN, IN, generator=generator)
    x = torch.randn(TOKENS, IN, generator=generator) @ mixing
    x_off = 0.7 * x + 0.3 * torch.randn(TOKENS, IN, generator=generator)
    return weight, x_off, x @ weight.T + 0.2 * torch.randn(TOKENS, OUT, generator=generator)


def missing(weight: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(T − W₀X̃)X̃ᵀ."""
    return (t - x @ weight.T).T @ x


def solved(weight: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The ridge solution from the formula, float64: (T X̃ᵀ + δW₀)(G + δI)⁻¹."""
    weight, x, t = weight.double(), x.double(), t.double()
    gram = x.T @ x
    ridge = DAMPING * gram.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, (t.T @ x + weight @ ridge).T).T


@pytest.mark.parametrize("tile", [correction.TILE, 4 * 2 * IN, 1])
def test_many_steps_reach_the_ridge_solution(problem: Problem, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(correction, "TILE", tile)
    weight, x, t = problem
    found = corrected_target(weight, x.T @ x, missing(weight, x, t), steps=200, damping=DAMPING)
    assert torch.allclose(found.double(), solved(weight, x, t), atol=1e-3)


def test_every_step_lowers_the_error(problem: Problem) -> None:
    weight, x, t = problem
    errors = []
    for steps in (0, 1, 2, 4, 8):
        found = corrected_target(weight, x.T @ x, missing(weight, x, t), steps=steps, damping=0.0)
        errors.append(float((x @ found.T - t).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_nothing_to_correct_leaves_the_dense_weight(problem: Problem) -> None:
    weight, x, _ = problem
    found = corrected_target(weight, x.T @ x, torch.zeros_like(weight), steps=8, damping=DAMPING)
    assert torch.equal(found, weight)


def test_dead_inputs_keep_their_weights(problem: Problem) -> None:
    weight, x, t = problem
    x = x.clone()
    x[:, 5] = 0.0
    found = corrected_target(weight, x.T @ x, missing(weight, x, t), steps=8, damping=DAMPING)
    assert torch.equal(found[:, 5], weight[:, 5])
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("spoil", ["shape", "nan"])
def test_what_cannot_be_is_refused(problem: Problem, spoil: str) -> None:
    weight, x, t = problem
    lack = missing(weight, x, t)
    lack = lack[:, 1:] if spoil == "shape" else lack.index_fill(1, torch.tensor([2]), float("nan"))
    with pytest.raises(HwpqError, match="layer 7"):
        corrected_target(weight, x.T @ x, lack, steps=8, damping=DAMPING, where="layer 7")
