"""The table of changed figures, from what `dvc metrics diff --all --json` prints."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

from hwpq_pipeline.reporting.changes import changes_table, main
from tests.reported import METRICS

FILE = "data/08_reporting/{}/metrics.json"


def flattened(metrics: dict[str, Any]) -> dict[str, float]:
    single = {name: value for name, value in metrics.items() if name != "seconds"}
    return {**single, **{f"seconds.{stage}": value for stage, value in metrics.get("seconds", {}).items()}}


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    before, now = flattened(old), flattened(new)
    return {name: {"old": before.get(name), "new": now.get(name)} for name in sorted({*before, *now})}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_only_figures_that_changed_are_shown_each_with_its_direction():
    changed = {
        **METRICS, "perplexity": 60.0, "top1_agreement": 0.4, "sparsity": 0.6,
        "seconds": {**METRICS["seconds"], "compress": 50.0},
    }  # fmt: skip
    found = changes_table(
        {FILE.format("b"): difference(METRICS, changed), FILE.format("a"): difference(METRICS, METRICS)}
    )
    assert rows(found) == [
        ["b", "perplexity", "68.10", "60.00", "better"],
        ["b", "top-1 agreement", "48.0%", "40.0%", "worse"],
        ["b", "sparsity of the blocks", "50.0%", "60.0%", ""],
        ["b", "seconds to make, calibration included", "94", "100", "worse"],
    ]


def test_a_change_that_nobody_can_see_is_not_judged():
    found = changes_table({FILE.format("a"): difference(METRICS, {**METRICS, "perplexity": 68.1001})})
    assert rows(found) == [["a", "perplexity", "68.10", "68.10", ""]]


def test_a_new_variant_has_nothing_before():
    (first, *others) = rows(changes_table({FILE.format("new"): difference({}, METRICS)}))
    assert first == ["new", "perplexity", "none", "68.10", ""]
    assert all(row[2] == "none" for row in others)


def test_no_change_is_no_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({FILE.format("a"): difference(METRICS, METRICS)})))
    main()
    assert capsys.readouterr().out.strip() == ""
