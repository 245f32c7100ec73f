"""2:4 selection against an exhaustive search over all six patterns of a group."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.contribution import METRICS, contribution
from hwpq_pipeline.compression.structured import check_two_of_four, select_two_of_four
from hwpq_pipeline.errors import HwpqError


def exhaustive(scores: Tensor) -> Tensor:
    """Of all ways to keep two of four, the one of greatest sum; of equals the first in column order."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for i in range(scores.shape[0]):
        for first in range(0, scores.shape[1], 4):
            group = scores[i, first : first + 4].double().tolist()
            best = max(combinations(range(4), 2), key=lambda pair: group[pair[0]] + group[pair[1]])  # first of equals
            keep[i, [first + member for member in best]] = True
    return keep


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pattern_of_greatest_contribution_is_kept(metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, energy = torch.randn(9, 44, generator=generator).to(dtype), torch.rand(44, generator=generator)
    found = select_two_of_four(weight, metric, energy)
    keep = unpack_bits(found.keep, 44)
    assert found.reached == 1 - int(keep.sum()) / keep.numel() == 0.5
    scores = contribution(metric, weight, energy)
    expected = exhaustive(scores)
    kept = (scores.double() * keep).unflatten(1, (-1, 4)).sum(2)
    torch.testing.assert_close(kept, (scores.double() * expected).unflatten(1, (-1, 4)).sum(2), rtol=1e-6, atol=0)
    check_two_of_four(keep, "test")
    # Nine rows of 44 are fewer than the sample takes: the quantiles are those of all contributions.
    levels = torch.tensor([int(name[1:]) / 100 for name in found.quantiles], dtype=torch.float64)
    wanted = torch.quantile(scores.double().flatten(), levels)
    torch.testing.assert_close(torch.tensor(list(found.quantiles.values())).double(), wanted, rtol=1e-6, atol=0)


def test_ties_go_to_the_lower_column() -> None:
    weight = torch.tensor([[1.0, 1, 1, 1, 1, 2, 2, 2, 2, 1, 2, 1, 0, 0, 0, 0, 0, 3, 0, 0, 1, 2, 1, 1]])
    keep = unpack_bits(select_two_of_four(weight, "magnitude", torch.ones(24)).keep, 24)
    expected = [1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert keep[0].int().tolist() == expected


def test_columns_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(HwpqError, match=r"layers\.3\.q_proj: 30 columns do not divide into groups of 4\. Leave"):
        select_two_of_four(torch.ones(2, 30), "wanda", torch.ones(30), where="layers.3.q_proj")
    with pytest.raises(HwpqError, match="do not divide"):
        check_two_of_four(torch.ones(2, 30), "here")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_refused(bad: float, dtype: torch.dtype) -> None:
    for column in (0, 31, 33, 35):
        weight = torch.ones(5, 36, dtype=dtype)
        weight[3, column] = bad
        with pytest.raises(HwpqError, match="row 3 of the weight holds non-finite"):
            select_two_of_four(weight, "magnitude", torch.ones(36))


def test_the_check_finds_the_group() -> None:
    good = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    check_two_of_four(good.bool(), "layer")
    check_two_of_four(good.float(), "layer")
    fewer = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]])
    check_two_of_four(fewer, "layer")  # a kept weight may be zero
    with pytest.raises(
        HwpqError, match="layer: 1 groups of four are not 2:4, the first in row 0, columns 0 to 3, with 1"
    ):
        check_two_of_four(fewer.bool(), "layer")  # but a mask keeps two
    with pytest.raises(HwpqError, match="row 1, columns 4 to 7, with 3 kept"):
        check_two_of_four(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 0]]), "layer")
