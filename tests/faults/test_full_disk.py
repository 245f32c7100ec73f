"""A disk that is full, and one that is read-only, at every stage: one line, nothing half-written, the old as it was.

The disk is a real one (a tmpfs), full to the last page or with room for a part of what the stage writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hwpq_pipeline.decoder.spool import Spool
from tests.faults.conftest import Disk
from tests.faults.stages import OUTPUTS, left_over, refusal, run_stage, tree, without_seconds
from tests.small import ok
from tests.tiny import tiny_tokens

pytestmark = pytest.mark.slow
#: Room for a part of what a stage writes, as a share. `report` replaces file after file: it needs room for one alone.
ROOM = {stage: 0.1 if stage == "report" else 0.5 for stage in OUTPUTS}


def bytes_of(disk: Disk, stage: str) -> int:
    """What a stage's outputs take."""
    places = [disk.data / output for output in OUTPUTS[stage]]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def check_full(disk: Disk, stage: str, share: float) -> None:
    before = tree(disk.data)
    disk.fill(int(bytes_of(disk, stage) * share))
    try:
        line = refusal(run_stage(disk.project, stage))
    finally:
        disk.empty()
    assert "no space left on device" in line
    assert "Free some space, and run it again" in line
    assert tree(disk.data) == before
    ok(run_stage(disk.project, stage))
    assert left_over(disk.project) == []
    assert without_seconds(tree(disk.data)) == without_seconds(before)


def check_read_only(disk: Disk, stage: str) -> None:
    before = tree(disk.data)
    disk.writable(False)
    try:
        line = refusal(run_stage(disk.project, stage))
    finally:
        disk.writable(True)
    assert "read-only file system" in line
    assert "mount it for writing" in line
    assert tree(disk.data) == before


def test_a_full_disk_is_one_line(disk: Disk) -> None:
    check_full(disk, "compress", 0.5)


def test_a_read_only_disk_is_one_line(disk: Disk) -> None:
    check_read_only(disk, "select")


@pytest.mark.faults
@pytest.mark.parametrize("room", [False, True], ids=["full", "room for a part"])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_full_disk_at_every_stage(disk: Disk, stage: str, room: bool) -> None:
    check_full(disk, stage, ROOM[stage] if room else 0)


@pytest.mark.faults
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_read_only_disk_at_every_stage(disk: Disk, stage: str) -> None:
    check_read_only(disk, stage)


@pytest.mark.faults
def test_a_database_on_a_full_disk(disk: Disk) -> None:
    """`track` writes nowhere else."""
    database = disk.data / "runs.db"
    disk.fill(0)
    try:
        line = refusal(run_stage(disk.project, "track", env={"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}))
    finally:
        disk.empty()
        for file in disk.data.glob("runs.db*"):  # and its lock
            file.unlink()
    assert "MLflow failed" in line
    assert "The results are on disk" in line


def test_hidden_states_on_a_full_disk(disk: Disk) -> None:
    """They are written as they come, so a full disk must be told as the system tells it."""
    scratch = disk.data / "states"
    states = Spool([tiny_tokens()], directory=scratch, in_memory=0)
    disk.fill(0)
    try:
        with pytest.raises(OSError, match="No space left on device"):
            states.append(tiny_tokens(samples=512, length=128))
    finally:
        disk.empty()
        states.close()
    assert list(scratch.iterdir()) == []
    scratch.rmdir()
    assert not Path(scratch).exists()
