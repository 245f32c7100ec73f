"""The comparison, for files and for the terminal."""

from __future__ import annotations

import pytest

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.figures import FIGURES
from hwpq_pipeline.reporting.comparison import comparison_table, show_table
from hwpq_pipeline.schemas import Comparison
from tests.reported import METRICS, SHOWN


def test_a_row_a_variant_in_order():
    table = comparison_table({"b": METRICS, "a": {**METRICS, "perplexity": 20.0}})
    assert table["variant"].tolist() == ["b", "a"]
    assert table["perplexity"].tolist() == [68.1, 20.0]
    assert table["seconds_to_make"].tolist() == [94.0, 94.0]
    Comparison.validate(table)


def test_a_figure_that_is_missing_is_named_with_its_variant():
    old = {name: value for name, value in METRICS.items() if name != "kl_divergence"}
    with pytest.raises(HwpqError, match=r"metrics of b: no kl_divergence\. Run the evaluate pipeline"):
        comparison_table({"a": METRICS, "b": old})


@pytest.mark.parametrize("damaged", [{}, None])
def test_metrics_that_are_empty_are_named_with_their_variant(damaged):
    with pytest.raises(HwpqError, match=r"^metrics of b: no perplexity, .*Run the evaluate pipeline"):
        comparison_table({"a": METRICS, "b": damaged})


def test_nothing_is_cut_short_in_a_pipe(capsys):
    show_table(comparison_table({"paper-2of4-fp8": METRICS}))
    shown = capsys.readouterr().out
    for text in ("paper-2of4-fp8", *(figure.label for figure in FIGURES), *SHOWN.values()):
        assert text in shown
    assert "…" not in shown
