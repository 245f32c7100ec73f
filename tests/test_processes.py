"""Working space of the dead is removed, that of the living stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hwpq_pipeline.processes import born, left_overs, mark, new_folder, temporary_folder


def make_and_die(parent: Path, prefix: str) -> None:
    (new_folder(parent, prefix) / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def leave(parent: Path, prefix: str = "") -> Path:
    """A folder of a process that was killed."""
    before = set(parent.iterdir())
    process = multiprocessing.get_context("fork").Process(target=make_and_die, args=(parent, prefix))
    process.start()
    process.join()
    (left,) = set(parent.iterdir()) - before
    return left


@pytest.mark.parametrize("prefix", ["", "states-", ".model-2.", "1-2-3."])
def test_what_the_dead_left_is_removed(tmp_path: Path, prefix: str) -> None:
    left, others = leave(tmp_path, prefix), leave(tmp_path, "other-")
    mine = new_folder(tmp_path, prefix)
    assert sorted(tmp_path.iterdir()) == sorted([mine, others])
    assert not left.exists()
    assert new_folder(tmp_path, prefix) != mine
    assert mine.exists()


def test_what_another_living_process_has_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / mark().replace(mark().partition("-")[2], f"{other.pid}-{born(psutil.Process(other.pid))}")
        theirs = theirs.with_name(f"{theirs.name}.x")
        theirs.mkdir()
        again = theirs.with_name(f"{theirs.name[:-3]}9.x")  # the same id, and another beginning
        again.mkdir()
        assert list(left_overs(tmp_path)) == [again]
        other.communicate(b"\n")
    assert set(left_overs(tmp_path)) == {theirs, again}


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", ""])
    began = born(psutil.Process(other.pid))
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    left = tmp_path / f"{mark().partition('-')[0]}-{other.pid}-{began}.x"
    left.mkdir()
    assert list(left_overs(tmp_path)) == [left]
    other.wait()


def test_another_machines_stay_and_so_do_others_files(tmp_path: Path) -> None:
    for name in (f"elsewhere-{2**22}-1.x", "states-abc", "a.b", f"{mark().partition('-')[0]}-1-.x"):
        (tmp_path / name).mkdir()
    assert list(left_overs(tmp_path)) == []


def test_a_temporary_folder_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), temporary_folder(tmp_path, "t-") as folder:
        folder.read_text()
    assert list(tmp_path.iterdir()) == []
