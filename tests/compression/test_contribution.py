"""Contributions against the published formulas, a weight at a time in Python's float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.contribution import (
    METRICS,
    SMALLEST_REST,
    contribution,
    contribution_quantiles,
    root_contribution,
    root_factors,
)
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.variant import Selection


def published(metric: str, weight: Tensor, energy: Tensor) -> Tensor:
    """From the papers, element by element."""
    w, x2 = weight.double().tolist(), energy.double().tolist()
    total = sum(x2)
    result = torch.zeros(weight.shape, dtype=torch.float64)
    for i, row in enumerate(w):
        for j, value in enumerate(row):
            if metric == "magnitude":
                found = value**2
            elif metric == "wanda":  # |w| · ‖x‖₂, squared
                found = (abs(value) * math.sqrt(x2[j])) ** 2
            elif metric == "hwpq":
                found = value**2 / (1 - x2[j] / total)
            elif metric == "hwpq_weighted":
                found = value**2 * x2[j] / (1 - x2[j] / total)
            elif metric == "ria":  # relative importance and activations, a = 1/2, squared
                by_column = sum(abs(other[j]) for other in w)
                by_row = sum(abs(other) for other in row)
                relative = abs(value) / by_column + abs(value) / by_row
                found = (relative * math.sqrt(x2[j]) ** 0.5) ** 2
            else:
                raise AssertionError(f"no published formula for {metric}")
            result[i, j] = found
    return result


def test_a_variant_may_name_every_metric() -> None:
    offered = get_args(Selection.model_fields["metric"].annotation)
    assert [name for kind in offered for name in get_args(kind)] == list(METRICS)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_are_the_published_ones(metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 11, generator=generator).to(dtype)
    energy = torch.rand(11, generator=generator) * 100
    energy[3] = 2000  # dominates, so that the paper's denominator matters
    found = contribution(metric, weight, energy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), published(metric, weight, energy), rtol=2e-6, atol=0)


def test_hessian_of_one_token_is_where_the_closed_form_comes_from() -> None:
    # H = x xᵀ + ε I has [H⁻¹]_jj = (1 − x_j² / (S + ε)) / ε (Sherman–Morrison), so OBS prices w_j at ε times the closed
    # form. Held against a numerical inverse.
    x = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    damping = 1e-9
    inverse = torch.linalg.inv(torch.outer(x, x) + damping * torch.eye(4, dtype=torch.float64))
    obs = weight**2 / inverse.diagonal()
    ours = contribution("hwpq", weight.float(), (x**2).float()).double()
    torch.testing.assert_close(ours, obs / damping, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_without_any_energy_every_metric_is_the_magnitude(metric: str) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(contribution(metric, weight, torch.zeros(5)), weight.square())


def test_an_input_with_all_the_energy_ranks_first_and_stays_finite() -> None:
    weight = torch.ones(1, 4)
    found = contribution("hwpq", weight, torch.tensor([0.0, 9.0, 0.0, 0.0]))
    assert found[0, [0, 2, 3]].tolist() == [1, 1, 1]
    assert found[0, 1].item() == pytest.approx(1 / SMALLEST_REST, rel=1e-6)
    weighted = contribution("hwpq_weighted", weight, torch.tensor([0.0, 9.0, 0.0, 0.0]))
    assert weighted.isfinite().all()
    assert weighted[0].argmax() == 1


def test_rows_and_columns_of_zeros_have_no_relative_importance() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    found = contribution("ria", weight, torch.ones(3))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.0], [0.0, (1 + 2 / 3) ** 2, (1 + 1 / 3) ** 2]]))


@pytest.mark.parametrize("metric", METRICS)
def test_factors_of_some_rows_are_those_of_the_layer(metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, energy = torch.randn(9, 7, generator=generator), torch.rand(7, generator=generator)
    factors, some = root_factors(metric, weight, energy), torch.tensor([1, 5, 8])
    whole = root_contribution(weight, factors)
    assert torch.equal(root_contribution(weight[some], factors.rows(some)), whole[some])


def test_quantiles_are_those_of_the_sample() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    found = contribution_quantiles(weight, root_factors("magnitude", weight, torch.ones(512)))
    values = weight.square().flatten().double()
    assert list(found) == ["q01", "q10", "q25", "q50", "q75", "q90", "q99"]
    for name, value in found.items():
        assert value == pytest.approx(float(values.quantile(int(name[1:]) / 100)), rel=0.05)


@pytest.mark.parametrize(
    ("metric", "weight", "energy", "message"),
    [
        ("obd", torch.ones(2, 3), torch.ones(3), "unknown metric 'obd'"),
        ("wanda", torch.ones(2, 3), torch.ones(4), "does not fit"),
        ("wanda", torch.ones(2, 3), torch.tensor([1.0, -1.0, 1.0]), "negative or non-finite"),
        ("wanda", torch.ones(2, 3), torch.tensor([1.0, float("nan"), 1.0]), "negative or non-finite"),
        ("wanda", torch.ones(2, 3, dtype=torch.int8), torch.ones(3), "dtype"),
    ],
)
def test_bad_input_is_named(metric: str, weight: Tensor, energy: Tensor, message: str) -> None:
    with pytest.raises(HwpqError, match=message):
        contribution(metric, weight, energy)
