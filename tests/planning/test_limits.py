"""What cannot fit is refused, what is tight is told, and what does not run does not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwpq_pipeline import project
from hwpq_pipeline.planning import Need, limits
from hwpq_pipeline.planning.limits import Machine, this_machine, tight, too_large
from tests.tiny import tiny_checkpoint

GB = 10**9
LARGE = Machine(memory=16 * GB, free_memory=8 * GB, disk=100 * GB, temporary=10 * GB, gpu=8 * GB)


def need(**changes: int | str) -> Need:
    values = {"memory": GB, "gpu": 0, "disk": GB, "working": 0, "read": 0, "remedy": "Leave out its healing."}
    return Need(stage="compress", variant="v", **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": 17 * GB}, "compress of v: it takes some 17.0 GB of memory, and there are 16.0 GB"),
        ({"gpu": 9 * GB}, "compress of v: it takes some 9.0 GB of GPU memory, and there are 8.0 GB"),
        ({"working": 11 * GB}, "compress of v: it takes some 11.0 GB of temporary files, and there are 10.0 GB"),
        ({"disk": 101 * GB}, "data: these stages leave some 101.0 GB, and there is place for 100.0 GB"),
    ],
)
def test_what_cannot_fit_is_one_line_with_a_remedy(changes, said):
    (error,) = too_large([need(**changes)], LARGE)
    assert str(error).startswith(said)
    assert error.remedy
    assert "\n" not in str(error)


def test_what_fits_is_not_refused_even_if_it_fills_the_machine():
    assert too_large([need(memory=16 * GB, gpu=8 * GB, working=10 * GB, disk=100 * GB)], LARGE) == []


def test_the_disk_of_all_stages_counts_together():
    assert too_large([need(disk=60 * GB)], LARGE) == []
    assert len(too_large([need(disk=60 * GB), need(disk=60 * GB)], LARGE)) == 1


def test_what_other_programs_hold_is_told_and_not_refused():
    between = need(memory=9 * GB)
    assert too_large([between], LARGE) == []
    (line,) = tight([between, need()], LARGE)
    assert line == "compress of v takes some 9.0 GB of memory, and 8.0 GB are free"


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    file = tmp_path / "memory.max"
    monkeypatch.setattr(limits, "_LIMITS", (str(file), str(tmp_path / "missing")))
    whole = this_machine(tmp_path / "data").memory
    file.write_text("1000000\n")
    assert this_machine(tmp_path / "data").memory == 1_000_000
    file.write_text("max\n")
    assert this_machine(tmp_path / "data").memory == whole > 1_000_000


def test_bytes_that_a_run_replaces_are_room_for_it(tmp_path):
    empty = this_machine(tmp_path / "data").disk
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old").write_bytes(bytes(50_000_000))
    assert this_machine(tmp_path / "data").disk == pytest.approx(empty, abs=45_000_000)


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(limits, "this_machine", lambda _: Machine(1, 1, 10**12, 10**12))


def unaffordable(model: Path, stages: set[tuple[str, str]], **sections) -> list[str]:
    parameters = {
        "calibration": {"samples": 4, "length": 64, "seed": 0},
        "evaluation": {"samples": 4, "length": 64, "seed": 0},
        "report": {"prompts": []},
        "compute": {"device": "cpu"},
        **sections,
    }
    entries = {"a": {"description": "d"}, "b": {"description": "d", "quantization": {"grid": "int8"}}}
    return [str(error) for error in project.unaffordable(model, entries, parameters, frozenset(stages))]


def test_stages_that_do_not_run_do_not_count(tmp_path, small_machine):
    model = tiny_checkpoint(tmp_path / "model")
    (line,) = unaffordable(model, {("compress", "b"), ("recipes", "a")})
    assert line.startswith("compress of b: it takes some")
    assert unaffordable(model, {("fetch", ""), ("report", "")}) == []
    lines = unaffordable(model, {("calibrate", ""), ("evaluate", "a")})
    assert [line.partition(":")[0] for line in lines] == ["calibrate", "evaluate of a"]


def test_without_a_model_that_can_be_read_its_reader_says_it(tmp_path, small_machine):
    assert unaffordable(tmp_path / "missing", {("calibrate", "")}) == []
