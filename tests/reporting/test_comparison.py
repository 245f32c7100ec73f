"""The comparison, for files and for the terminal."""

from __future__ import annotations

import pytest

from hwpq_pipeline.figures import making_seconds
from hwpq_pipeline.reporting.comparison import comparison_table, show_table

FIGURES = {
    "perplexity": 68.1, "perplexity_ratio": 3.3, "kl_divergence": 1.28, "top1_agreement": 0.48, "sparsity": 0.5,
    "size_bytes": 163_227_736, "compression_ratio": 1.65,
    "seconds": {"calibrate": 46.0, "select": 3.0, "compress": 44.0, "export": 1.0, "evaluate": 33.0},
}  # fmt: skip


def test_seconds_leave_evaluation_out():
    assert making_seconds(FIGURES) == pytest.approx(94.0)


def test_a_row_a_variant_in_order():
    table = comparison_table({"b": FIGURES, "a": {**FIGURES, "perplexity": 20.0}})
    assert table["variant"].tolist() == ["b", "a"]
    assert table["perplexity"].tolist() == [68.1, 20.0]
    assert table["seconds"].tolist() == [94.0, 94.0]


def test_nothing_is_cut_short_in_a_pipe(capsys):
    show_table(comparison_table({"paper-2of4-fp8": FIGURES}))
    shown = capsys.readouterr().out
    for text in ("paper-2of4-fp8", "top-1 agreement", "seconds to make", "163.2", "48.0%"):
        assert text in shown
    assert "…" not in shown
