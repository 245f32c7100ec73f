"""The table of figures: one home for each label, and all that shows figures reads it."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import results
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.quality import Quality
from hwpq_pipeline.evaluation.size import Size
from hwpq_pipeline.figures import FIGURES, GATED, LAYER_FIGURES, TIME, Figure, cells, making_seconds, values
from hwpq_pipeline.layer_columns import COMPRESSED, IDENTITY, SELECTED, names
from hwpq_pipeline.pipelines.gate.limits import Gate
from hwpq_pipeline.reporting.comparison import comparison_table
from hwpq_pipeline.schemas import Comparison, CompressedLayers, Layers, SelectedLayers
from hwpq_pipeline.tracking.view import COLUMNS, experiment_tags, view_state
from tests.reported import METRICS, SHOWN

HOME = "figures.py"
#: A label of one plain word is also a figure's name, and stands in prose.
LABELS = [figure.label for figure in FIGURES if not figure.label.isalpha()] + [shown.label for shown in LAYER_FIGURES]
#: What the figures were called in other places before.
ONCE = [
    "× dense", "KL (nats)", "KL, nats", "KL divergence from", "top-1", "likeliest token as the dense", "MB on disk",
    "megabytes of weights", "size on disk", "× smaller", "seconds to make", "times the dense model's",
]  # fmt: skip


def strings(path: Path) -> list[str]:
    """The strings of a module without its docstrings; a template as it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [text]
    tree = ast.parse(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def test_a_label_stands_in_one_file(root):
    files = [path for ending in ("*.py", "*.j2") for path in (root / "src").rglob(ending)]
    found = {
        path.name: label
        for path in [*files, root / "benchmarks" / "readme.py"]
        for label in [*LABELS, *ONCE]
        if any(label.lower() in text.lower() for text in strings(path))
    }
    assert set(found) == {HOME}, found


def test_names_and_labels_are_told_apart():
    assert len({figure.name for figure in FIGURES}) == len({figure.label for figure in FIGURES}) == len(FIGURES)
    assert len({figure.limit for figure in GATED}) == len(GATED)


def filled(kind: type[Any]) -> Any:
    """A result of a kind with one half in every field."""
    return kind(**dict.fromkeys((field.name for field in fields(kind)), 0.5))


def test_evaluation_gives_every_figure_but_the_seconds():
    quality, size = (filled(kind) for kind in (Quality, Size))
    given = {**quality.figures(), **size.figures()}
    told = {figure.name for figure in FIGURES} - {TIME.name}
    dense = {figure.dense for figure in FIGURES if isinstance(figure.dense, str)}
    assert set(given) == told | dense
    assert all(isinstance(value, int | float) for value in given.values())


def test_seconds_to_make_are_calibration_to_export():
    assert making_seconds(METRICS) == pytest.approx(46 + 3 + 44 + 1)
    assert values(METRICS, where="a")["seconds_to_make"] == pytest.approx(94)
    assert "calibration included" in TIME.label


def test_numbers_are_shown_in_the_unit_of_the_label():
    shown = dict(zip((figure.name for figure in FIGURES), cells(values(METRICS, where="a")), strict=True))
    assert {name: shown[name] for name in SHOWN} == SHOWN


@pytest.mark.parametrize("lost", [figure.name for figure in FIGURES if figure is not TIME] + ["seconds"])
def test_a_figure_that_is_missing_is_named(lost):
    with pytest.raises(HwpqError, match="seconds_to_make" if lost == "seconds" else lost):
        values({name: value for name, value in METRICS.items() if name != lost}, where="a")


def test_limits_are_named_by_the_direction_of_better():
    limits = {figure.name: figure.limit for figure in GATED}
    assert limits["perplexity_ratio"] == "maximum_perplexity_ratio"
    assert limits["top1_agreement"] == "minimum_top1_agreement"
    assert limits["size_bytes"] == "maximum_bytes"
    assert list(Gate.model_fields) == [figure.limit for figure in GATED]
    assert all(figure.better for figure in GATED)
    assert Figure("score", "score", "share of right answers", "share", better="higher", gate="score").limit == (
        "minimum_score"
    )


def test_the_comparison_is_checked_by_the_table():
    whole = comparison_table({"a": METRICS, "b": METRICS})
    assert list(Comparison.columns) == list(whole.columns) == ["variant", *(figure.name for figure in FIGURES)]
    Comparison.validate(whole)
    for column, wrong in (("top1_agreement", 1.01), ("perplexity", 0.0), ("seconds_to_make", -1.0), ("variant", "b")):
        with pytest.raises(Exception, match=column):
            Comparison.validate(whole.assign(**{column: [wrong, whole[column][1]]}))


def test_mlflow_shows_the_table():
    assert list(COLUMNS) == [figure.name for figure in FIGURES]
    state = view_state()
    assert state["selectedColumns"] == [f"metrics.`{name}`" for name in COLUMNS]
    note = experiment_tags("7")["mlflow.note.content"]
    for figure in FIGURES:
        assert f"`{figure.name}`, {figure.label}: {figure.meaning}" in note


def test_the_readme_shows_the_table(monkeypatch):
    monkeypatch.setattr("benchmarks.readme.metrics", lambda _: METRICS)
    head, _, *rows = (line for line in results().splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["variant", *(figure.label for figure in FIGURES)]
    assert all(row.count("|") == head.count("|") for row in rows)


def test_columns_of_the_layer_tables_have_one_home():
    selected, compressed = ([*names(IDENTITY), *names(part)] for part in (SELECTED, COMPRESSED))
    assert list(SelectedLayers.columns) == selected
    assert list(CompressedLayers.columns) == compressed
    assert list(Layers.columns) == [*selected, *names(COMPRESSED)]
    assert {shown.column for shown in LAYER_FIGURES} <= set(Layers.columns)
