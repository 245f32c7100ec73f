"""Limits on figures: what breaks, by how much, and what cannot slip through."""

from __future__ import annotations

import math

import pytest

from hwpq_pipeline.figures import GATED
from hwpq_pipeline.reporting.gates import broken_gates, count_gates
from tests.reported import METRICS

FIGURES = {**METRICS, "perplexity_ratio": 3.3, "top1_agreement": 0.48, "size_bytes": 163_227_736}


def test_limits_that_are_met_exactly_hold():
    limits = {"maximum_perplexity_ratio": 3.3, "minimum_top1_agreement": 0.48, "maximum_bytes": 163_227_736}
    assert broken_gates({"a": limits}, {"a": FIGURES}) == []
    assert count_gates({"a": limits, "b": {"maximum_bytes": None}}) == 3


@pytest.mark.parametrize(
    ("limit", "bound", "message"),
    [
        ("maximum_perplexity_ratio", 3.29, "a: perplexity_ratio is 3.3, above maximum_perplexity_ratio 3.29."),
        ("minimum_top1_agreement", 0.481, "a: top1_agreement is 0.48, below minimum_top1_agreement 0.481."),
        ("maximum_bytes", 163_227_735, "a: size_bytes is 163,227,736, above maximum_bytes 163,227,735."),
    ],
)
def test_each_limit_that_is_missed_is_an_error_of_its_own(limit, bound, message):
    loose = {"maximum_perplexity_ratio": 99.0, "minimum_top1_agreement": 0.0, "maximum_bytes": 10**12}
    (error,) = broken_gates({"a": {**loose, limit: bound}}, {"a": FIGURES})
    assert message in str(error)
    assert "quality_gates.yml" in str(error)


def test_all_that_fails_is_named():
    tight = {figure.limit: 0 if figure.better == "lower" else 1e12 for figure in GATED}
    errors = broken_gates({"a": tight, "b": tight}, {"a": FIGURES, "b": FIGURES})
    assert len(errors) == 2 * len(GATED)


@pytest.mark.parametrize("limit", [figure.limit for figure in GATED])
def test_a_figure_that_is_not_a_number_keeps_no_limit(limit):
    lost = {**FIGURES, **dict.fromkeys((figure.name for figure in GATED), math.nan)}
    assert len(broken_gates({"a": {limit: 1.0}}, {"a": lost})) == 1


def test_a_gate_on_no_variant_is_a_mistake():
    (error,) = broken_gates({"2of4-pf8": {"maximum_bytes": 1}}, {"2of4-fp8": FIGURES})
    assert str(error) == "quality_gates.yml: variants.2of4-pf8: no such variant. Use one of 2of4-fp8"


@pytest.mark.parametrize(
    "damaged",
    [
        {}, None, [], {**FIGURES, "perplexity_ratio": None}, {**FIGURES, "size_bytes": "1"},
        {name: value for name, value in FIGURES.items() if name != "coverage"},
        {**FIGURES, "seconds": None}, {**FIGURES, "seconds": {"calibrate": None}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("gates", [{"a": {"maximum_bytes": 10**12}}, {"a": {}}, {}])
def test_a_variant_without_its_figures_fails_with_or_without_a_limit(damaged, gates):
    (error,) = broken_gates(gates, {"a": damaged, "b": FIGURES})
    assert str(error).startswith("metrics of a: no ")
    assert "evaluate" in str(error)
    assert "\n" not in str(error)


def test_coverage_below_its_limit_fails():
    (error,) = broken_gates({"a": {"minimum_coverage": 0.99}}, {"a": {**FIGURES, "coverage": 0.1142}})
    assert "coverage is 0.1142, below minimum_coverage 0.99" in str(error)
