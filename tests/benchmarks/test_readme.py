"""The generated parts of README and docs: what stands between the markers comes from the files that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.readme import BEGIN, END, PAGES, replaced


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_both_markers_once(root: Path, name: str) -> None:
    text = (root / PAGES[name][0]).read_text(encoding="utf-8")
    assert (text.count(BEGIN.format(name)), text.count(END.format(name))) == (1, 1)


@pytest.mark.parametrize(
    "name", ["selection", "peers", "bits", "healing", "formats", "serving", "runtime", "inference", "kills", "presets"]
)
def test_the_committed_tables_are_those_of_the_committed_results(root: Path, name: str) -> None:
    """What needs no run: the others are made from `data/`."""
    page, make = PAGES[name]
    text = (root / page).read_text(encoding="utf-8")
    assert replaced(text, name, make()) == text, f"python -m benchmarks.readme {name}"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    begin, end = BEGIN.format("results"), END.format("results")
    page = f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n"
    assert replaced(page, "results", "new") == f"before\n\n{begin}\n\nnew\n\n{end}\n\nafter\n"


@pytest.mark.parametrize("page", ["no marker", BEGIN.format("a"), 2 * f"{BEGIN.format('a')}{END.format('a')}"])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="must each stand on the page once"):
        replaced(page, "a", "new")


def test_presets_are_those_of_the_contest(root: Path) -> None:
    """The ratio and the perplexities of one row, from the file by hand."""
    rows = json.loads((root / "benchmarks/results/peers.json").read_text(encoding="utf-8"))["rows"]
    by_preset = {
        (row["method"], row["task"]): row
        for row in rows
        if row["samples"] == 32 and row["processor"].startswith("Intel")
    }
    fours, half = by_preset["hwpq-quality", "2of4"], by_preset["hwpq-quality", "50"]
    unit = by_preset["hwpq-fixed_mask", "2of4"]["seconds"]
    line = next(line for line in PAGES["presets"][1]().splitlines() if line.startswith("| `quality`"))
    assert line.endswith(f"| {fours['seconds'] / unit:.1f} | {fours['perplexity']:.1f} | {half['perplexity']:.1f} |")
