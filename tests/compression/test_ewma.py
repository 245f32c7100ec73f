"""Selection for a wanted sparsity: what is reached, on what rows, and that no position of a row is favoured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.contribution import contribution
from hwpq_pipeline.compression.ewma import (
    SAMPLE_ROWS,
    TOLERANCE,
    EwmaSelection,
    Threshold,
    ewma_select,
    upper_band,
)
from hwpq_pipeline.errors import HwpqError


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(1.5, (rows, columns))).float()


PLAIN = Threshold(alpha=1 / 128, beta=1 / 128, domain="sqrt", scope="row")


def magnitude(weight: Tensor, *, sample_rows: int = SAMPLE_ROWS, where: str = "here", **options: Any) -> EwmaSelection:
    energy, threshold = torch.ones(weight.shape[1]), replace(PLAIN, **options)
    return ewma_select(weight, "magnitude", energy, threshold, sample_rows=sample_rows, where=where)


def in_python(row: list[float], lam: float, alpha: float) -> list[bool]:
    """The rule in Python floats from a settled start (μ, σ of the row's end), without the kernels."""
    mu, sigma = row[0], 0.0
    for t, value in enumerate(row):
        away, gain = value - mu, max(alpha, 1 / (t + 1))
        sigma, mu = sigma + gain * (abs(away) - sigma), mu + gain * away
    keep = []
    for value in row:
        keep.append(value >= mu + lam * sigma)
        away = value - mu
        sigma, mu = sigma + alpha * (abs(away) - sigma), mu + alpha * away
    return keep


WEIGHTS = {
    "normal": lambda: normal(200, 640),
    "heavy": lambda: heavy(200, 640),
    "mixed": lambda: torch.cat([normal(130, 640), heavy(70, 640), torch.ones(100, 640) + normal(100, 640) / 100]),
    "half zeros": lambda: normal(200, 640) * (torch.rand(200, 640, generator=torch.Generator().manual_seed(1)) < 0.5),
    "outlier inputs": lambda: normal(200, 640) * (1 + 50 * (torch.arange(640) % 97 == 5)),
    "rows of all sizes": lambda: normal(200, 640) * torch.logspace(-30, 10, 200)[:, None],
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("domain", ["sqrt", "raw", "log"])
def test_the_wanted_sparsity_is_reached(kind: str, scope: Any, domain: Any) -> None:
    weight = WEIGHTS[kind]()
    for sparsity in (0.3, 0.5, 0.7) if kind != "half zeros" else (0.6, 0.7):
        found = magnitude(weight, sparsity=sparsity, scope=scope, domain=domain)
        keep = unpack_bits(found.keep, 640)
        assert found.reached == pytest.approx(1 - keep.double().mean().item(), abs=1e-9)
        if kind == "rows of all sizes" and domain == "raw":  # the squares of the smallest rows are all zero
            assert found.constant_rows > 0
        else:
            assert abs(found.reached - sparsity) <= TOLERANCE
            assert found.note == ""
        assert found.passes <= 2


def test_each_row_or_the_layer_reaches_it() -> None:
    weight = torch.cat([normal(100, 1000), heavy(100, 1000)])
    by_row = magnitude(weight, sparsity=0.5, scope="row")
    assert by_row.multiplier.shape == (200,)
    assert by_row.row_sparsity == pytest.approx((0.5, 0.5), abs=2e-3)
    layer = magnitude(weight, sparsity=0.5, scope="layer")
    assert layer.multiplier.shape == ()
    low, high = layer.row_sparsity
    assert high - low > 0.1
    assert layer.reached == pytest.approx(0.5, abs=TOLERANCE)


def test_rows_lose_whole_weights_that_add_up() -> None:
    # 0.37 · 33 = 12.21: rows lose 12 or 13, and the layer 37 %.
    found = magnitude(normal(400, 33), sparsity=0.37)
    lost = 33 - unpack_bits(found.keep, 33).sum(dim=1)
    assert set(lost.tolist()) <= {11, 12, 13, 14}
    assert found.reached == pytest.approx(0.37, abs=TOLERANCE)


def test_a_sample_that_misleads_is_corrected() -> None:
    # Three of eight rows behave otherwise; sixteen rows of 640 say little about how many.
    rows = [heavy(1, 512, seed) if seed % 8 < 3 else normal(1, 512, seed) for seed in range(640)]
    found = magnitude(torch.cat(rows), sparsity=0.6, scope="layer", sample_rows=16)
    assert abs(found.reached - 0.6) <= TOLERANCE
    assert found.passes == 2


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_impossible_sparsity_is_reported(scope: Any) -> None:
    weight = normal(64, 256)
    weight[10:20] = 0.25
    weight[20:24] = 0
    found = magnitude(weight, sparsity=0.5, scope=scope)
    assert found.constant_rows == 14
    assert bool(unpack_bits(found.keep, 256)[10:24].all())
    if scope == "row":  # each row for itself: the others do not make up for it
        assert found.reached == pytest.approx(0.5 * 50 / 64, abs=TOLERANCE)
        assert "reached a sparsity of 0.39" in found.note
        assert "14 of 64 rows have contributions without spread" in found.note
    else:
        assert found.reached == pytest.approx(0.5, abs=TOLERANCE)
        assert found.note == ""
    all_equal = magnitude(torch.ones(5, 40), sparsity=0.5, scope=scope)
    assert (all_equal.reached, all_equal.constant_rows) == (0, 5)
    assert "5 of 5 rows" in all_equal.note


def test_no_position_of_a_row_is_favoured() -> None:
    rows, columns = 16384, 448
    weight = normal(rows, columns, seed=3)
    for sparsity, domain in ((0.5, "sqrt"), (0.8, "sqrt"), (0.5, "log")):
        # One λ for all: solving each row would hide a slope within it.
        keep = unpack_bits(magnitude(weight, sparsity=sparsity, scope="layer", domain=domain).keep, columns)
        rate = keep.double().mean(dim=0)
        noise = (rate.mean() * (1 - rate.mean()) / rows).sqrt()
        # The first columns, each apart and together; the worst of 448 normal deviates stays below 4.2 (99 %).
        assert ((rate - rate.mean()) / noise).abs().max() < 4.5
        for part in (slice(0, 8), slice(0, 64), slice(64, 256), slice(-64, None)):
            share = keep[:, part].double().mean(dim=1)
            error = share.std() / rows**0.5
            assert abs(share.mean() - rate.mean()) < 3.5 * error + 2e-4


def test_the_flatness_test_can_fail() -> None:
    # The usual start (μ = the first value, σ = 0) favours what comes first.
    rows, columns = 2048, 192
    values = normal(rows, columns, seed=4).abs()
    mu, sigma = values[:, 0].clone(), torch.zeros(rows)
    kept = []
    for j in range(columns):
        away = values[:, j] - mu
        kept.append((away >= 1.0 * sigma).double().mean().item())
        sigma, mu = sigma + (away.abs() - sigma) / 64, mu + away / 64
    assert abs(np.mean(kept[:8]) - np.mean(kept[-64:])) > 0.05


def test_near_to_a_full_sort() -> None:
    weight, energy = normal(64, 2048), torch.rand(2048, generator=torch.Generator().manual_seed(5)) + 0.5
    scores = contribution("hwpq_weighted", weight, energy)
    keep = unpack_bits(ewma_select(weight, "hwpq_weighted", energy, replace(PLAIN, sparsity=0.5)).keep, 2048)
    best = scores.topk(1024, dim=1).values.sum()
    assert scores[keep].sum() > 0.99 * best


def test_the_papers_mode() -> None:
    weight, energy = normal(20, 600), torch.rand(600, generator=torch.Generator().manual_seed(6))
    found = upper_band(weight, "hwpq", energy)
    scores = contribution("hwpq", weight, energy).double()
    expected = torch.tensor([in_python(row.tolist(), 4.0, 1 / 8) for row in scores])
    keep = unpack_bits(found.keep, 600)
    # The start differs (the whole row here, its end there): the first memories of a row may, the rest may not.
    assert torch.equal(keep[:, 100:], expected[:, 100:])
    assert found.wanted is None
    assert found.note == ""
    assert found.multiplier_mean == 4
    assert 0.9 < found.reached < 0.99
    assert scores[keep].mean() > 4 * scores.mean()  # the band is of those that stand out


def test_what_is_reported() -> None:
    weight = normal(300, 512).abs() + 0.1
    found = magnitude(weight, sparsity=0.25)
    assert found.mean == pytest.approx(weight.mean().item(), rel=0.02)
    assert found.deviation == pytest.approx((weight - weight.mean()).abs().mean().item(), rel=0.05)
    assert found.quantiles["q50"] == pytest.approx(weight.square().median().item(), rel=0.05)
    assert found.columns == 512
    nothing = magnitude(weight, sparsity=0.0)
    assert (nothing.reached, nothing.note) == (0, "")


def test_the_same_arguments_give_the_same_mask() -> None:
    weight = heavy(500, 300)
    first, second = (magnitude(weight, sparsity=0.5, scope="layer") for _ in range(2))
    assert torch.equal(first.keep, second.keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither of sparsity and multiplier given"),
        ({"sparsity": 0.5, "multiplier": 4.0}, "both of sparsity and multiplier given"),
        ({"sparsity": 1.0}, "the sparsity is 1.0"),
        ({"sparsity": -0.1}, "the sparsity is -0.1"),
        ({"multiplier": float("nan")}, "the multiplier is nan"),
        ({"sparsity": 0.5, "scope": "model"}, "unknown scope 'model'"),
        ({"sparsity": 0.5, "domain": "cubic"}, "unknown domain 'cubic'"),
        ({"sparsity": 0.5, "alpha": 0.0}, "alpha is 0.0"),
        ({"sparsity": 0.5, "scope": "layer", "sample_rows": 15}, "sample_rows is 15"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HwpqError, match=message):
        magnitude(normal(4, 16), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{"multiplier": 0.0}, {"sparsity": 0.5}, {"sparsity": 0.5, "scope": "layer"}])
def test_non_finite_weights_are_refused(bad: float, options: dict[str, Any]) -> None:
    weight = normal(200, 90).bfloat16()
    weight[150, 3] = bad
    with pytest.raises(HwpqError, match=r"layers\.1\.v_proj: row 150 of the weight holds non-finite"):
        magnitude(weight, where="layers.1.v_proj", **options)
