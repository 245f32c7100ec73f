"""Recovery against numpy.linalg.lstsq, row by row, and against its own promises on unusual inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression import recovery
from hwpq_pipeline.errors import HwpqError

DAMPING = 0.01


def problem(rows: int, columns: int, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, mask, inputs (tokens, columns) with correlations, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    return weight, mask, inputs, inputs.T @ inputs


def least_squares(weight: Tensor, mask: Tensor, inputs: Tensor, delta: float) -> np.ndarray:
    """The minimiser by numpy.linalg.lstsq on the tokens themselves, damping appended as extra tokens."""
    tokens = np.vstack([inputs.double().numpy(), np.sqrt(delta) * np.eye(weight.shape[1])])
    solution = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        kept = mask[row].numpy()
        wanted = tokens @ weight[row].double().numpy()
        solution[row, kept] = np.linalg.lstsq(tokens[:, kept], wanted, rcond=None)[0]
    return solution


def output_error_by_loop(weight: Tensor, original: Tensor, inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(out,) squared output errors and energies from the tokens, one by one."""
    errors, energies = np.zeros(weight.shape[0]), np.zeros(weight.shape[0])
    for token in inputs.double().numpy():
        errors += ((weight.double().numpy() - original.double().numpy()) @ token) ** 2
        energies += (original.double().numpy() @ token) ** 2
    return errors, energies


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 12), (600, 16)])
def test_converges_to_the_least_squares_solution(
    rows: int, columns: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "TOLERANCE", 1e-7)  # go on where a layer would have stopped
    weight, mask, inputs, gram = problem(rows, columns)
    result = recovery.recover(weight, mask, gram, steps=60, damping=damping)
    wanted = least_squares(weight, mask, inputs, damping * float(gram.diagonal().mean()))
    np.testing.assert_allclose(result.weight.numpy(), wanted, atol=2e-4)


def test_errors_are_those_of_the_tokens() -> None:
    weight, mask, inputs, gram = problem(7, 12)
    result = recovery.recover(weight, mask, gram, steps=3, damping=DAMPING)
    before, energy = output_error_by_loop(weight * mask, weight, inputs)
    after, _ = output_error_by_loop(result.weight, weight, inputs)
    np.testing.assert_allclose(result.errors.before.numpy(), before, rtol=1e-4)
    np.testing.assert_allclose(result.errors.after.numpy(), after, rtol=1e-3)
    np.testing.assert_allclose(result.errors.energy.numpy(), energy, rtol=1e-4)
    assert result.errors.relative_before == pytest.approx(before.sum() / energy.sum(), rel=1e-4)
    assert result.errors.relative_after == pytest.approx(after.sum() / energy.sum(), rel=1e-3)
    some = recovery.relative_error(result.errors.after[2:5], result.errors.energy[2:5])
    assert some == pytest.approx(after[2:5].sum() / energy[2:5].sum(), rel=1e-3)
    errors, energies = recovery.output_error(result.weight, weight, gram)
    np.testing.assert_allclose(errors.numpy(), after, rtol=1e-3)
    np.testing.assert_allclose(energies.numpy(), energy, rtol=1e-4)


def test_a_few_steps_help_and_more_help_more() -> None:
    weight, mask, _, gram = problem(9, 32)
    results = [recovery.recover(weight, mask, gram, steps=steps, damping=DAMPING) for steps in (0, 1, 3, 10)]
    errors = [result.errors.relative_after for result in results]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[0]
    assert errors[0] == results[0].errors.relative_before


def test_stacked_layers_are_solved_as_if_alone() -> None:
    weight, mask, _, gram = problem(6, 16)
    whole = recovery.recover(weight, mask, gram, steps=5, damping=DAMPING)
    part = recovery.recover(weight[2:5], mask[2:5], gram, steps=5, damping=DAMPING)
    torch.testing.assert_close(whole.weight[2:5], part.weight)


def test_the_mask_holds_and_a_full_one_changes_nothing() -> None:
    weight, mask, _, gram = problem(5, 12)
    assert torch.equal(recovery.recover(weight, mask, gram, steps=5, damping=DAMPING).weight != 0, mask)
    full = recovery.recover(weight, torch.ones_like(mask), gram, steps=5, damping=DAMPING)
    assert torch.equal(full.weight, weight)
    assert full.errors.relative_after == 0.0
    empty = recovery.recover(weight, torch.zeros_like(mask), gram, steps=5, damping=DAMPING)
    assert torch.equal(empty.weight, torch.zeros_like(weight))
    assert empty.errors.relative_after == pytest.approx(1.0, rel=1e-5)


def test_dead_inputs_keep_their_weights_unless_pruned() -> None:
    weight, mask, inputs, _ = problem(6, 12)
    inputs[:, 3] = 0.0
    mask[:3, 3], mask[3:, 3] = True, False
    result = recovery.recover(weight, mask, inputs.T @ inputs, steps=20, damping=DAMPING)
    assert torch.equal(result.weight[:3, 3], weight[:3, 3])
    assert torch.equal(result.weight[3:, 3], torch.zeros(3))


def test_no_input_at_all_leaves_the_masked_weight() -> None:
    weight, mask, _, gram = problem(4, 8)
    result = recovery.recover(weight, mask, torch.zeros_like(gram), steps=5, damping=DAMPING)
    assert torch.equal(result.weight, weight * mask)
    assert (result.errors.relative_before, result.errors.relative_after, result.steps) == (0.0, 0.0, 0)


@pytest.mark.parametrize("damping", [0.01, 1.0, 100.0])
def test_no_row_gets_worse(damping: float) -> None:
    weight, mask, inputs, gram = problem(40, 24, tokens=6)  # rank 6: the damped solution may lose to the mask alone
    result = recovery.recover(weight, mask, gram, damping=damping, steps=50)
    before, _ = output_error_by_loop(weight * mask, weight, inputs)
    after, energy = output_error_by_loop(result.weight, weight, inputs)
    assert (after <= before + 1e-5 * energy).all()
    assert after.sum() < before.sum()


def test_stops_when_nothing_is_left_to_gain() -> None:
    weight, mask, _, gram = problem(4, 8)
    result = recovery.recover(weight, mask, gram, steps=500, damping=DAMPING)
    assert result.steps <= 12


def test_scale_of_the_inputs_does_not_matter() -> None:
    weight, mask, _, gram = problem(4, 8)
    results = [recovery.recover(weight, mask, gram * scale, steps=5, damping=DAMPING) for scale in (1e-12, 1e12)]
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "gram"])
def test_refuses_values_that_are_not_finite(bad: float, what: str) -> None:
    weight, mask, _, gram = problem(4, 8)
    (weight if what == "weight" else gram)[1, 2] = bad
    with pytest.raises(HwpqError, match=r"layer.7.*not finite"):
        recovery.recover(weight, mask, gram, where="layer.7", steps=5, damping=DAMPING)


def test_refuses_shapes_that_do_not_belong_together() -> None:
    weight, mask, _, gram = problem(4, 8)
    with pytest.raises(HwpqError, match=r"layer.7.*\(4, 8\).*\(7, 7\)"):
        recovery.recover(weight, mask, gram[:7, :7], where="layer.7", steps=5, damping=DAMPING)
