"""The contest's own rules: what a row is checked for, and that both sides are asked for the same thing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers.contest import check, key, table
from benchmarks.peers.jobs import TASKS, jobs_of
from benchmarks.peers.ours import recipe_of
from benchmarks.peers.tasks import BITS

REPORT = {"machine": {"cores": 2, "torch": "t"}, "model": "m", "peers": "x", "dense_perplexity": 20.0}
ROW = {
    "task": "int4",
    "side": "peer",
    "method": "gptq",
    "dtype": "float32",
    "samples": 8,
    "settings": {},
    "processor": "p",
}


def row(**changes: Any) -> dict[str, Any]:
    """A row of 2:4 over two layers that are right."""
    return {"task": "2of4", "zeros": {"a": 0.5, "b": 0.51}, "broken_fours": 0} | changes


def test_a_right_row_passes() -> None:
    assert check(row(), {}) == ""
    assert check(row(), {"a": 0.5, "b": 0.5}) == ""


@pytest.mark.parametrize(
    ("changes", "layers", "words"),
    [
        ({"zeros": {"a": 0.5, "b": 0.1}}, {}, "1 layers are not half zeros"),
        ({"broken_fours": 3}, {}, "3 fours"),
        ({}, {"a": 0.5}, "other layers"),
        ({"task": "50", "zeros": {"a": 0.5, "b": 0.52}}, {}, "not half zeros"),
    ],
)
def test_a_wrong_row_is_named(changes: dict[str, Any], layers: dict[str, float], words: str) -> None:
    assert words in check(row(**changes), layers)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "seven"])
@pytest.mark.parametrize("samples", [8, 32, 128])
def test_both_sides_play_and_no_row_twice(task: str, samples: int) -> None:
    jobs = jobs_of(task, samples)
    assert {job.side for job in jobs} == {"peer", "ours"}
    assert len({key(vars(job) | {"settings": job.settings, "processor": "p"}) for job in jobs}) == len(jobs)
    for job in jobs:
        if job.side == "ours":
            recipe = recipe_of(task, job.method)
            assert (recipe.selection is not None) == (task in ("2of4", "50", "2of4-int4"))
            assert bool([part for part in recipe.parts if part.quantization]) == (task in (*BITS, "fp8"))


def test_a_failed_row_shows_its_reason_and_no_figure() -> None:
    text = table(REPORT | {"rows": [ROW | {"error": "exit 1: it broke"}]})
    assert "it broke" in text
    assert "| int4 | peer | gptq | float32 | exit 1" in text


def test_rows_of_two_machines_stand_in_tables_of_their_own() -> None:
    here, there = (ROW | {"error": name, "processor": name} for name in ("here", "there"))
    assert key(here) != key(there)
    parts = table(REPORT | {"rows": [there, here]}).split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        f"8 × 512 calibration tokens, {name}" for name in ("here", "there")
    ]
    assert [part.count("gptq") for part in parts] == [1, 1]
