"""SIGKILL in the middle of a write: the next success has the same bytes, and leaves nothing of the dead run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hwpq_pipeline.decoder.spool import Spool
from tests.faults.stages import left_over, run_stage, tree, without_seconds
from tests.small import copy_small_project, ok
from tests.tiny import tiny_tokens


@pytest.fixture(scope="module")
def whole(small_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that each test leaves as it was."""
    return copy_small_project(small_project, tmp_path_factory.mktemp("left-overs") / "project")


def written(data: Path) -> bool:
    """Whether a running stage has written something that is no result yet."""
    files = [*(data / ".scratch").glob("*/**/*"), *(data / ".work").glob("[a-z]*/**/*")]
    return any(path.is_file() for path in files)


def killed_while_it_writes(project: Path, stage: str) -> bool:
    """Run a stage, and kill its process as soon as it has written something; whether it was caught."""
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(run_stage(project, stage).returncode))
    thread.start()
    killed = False
    while thread.is_alive() and not killed:
        with suppress(StopIteration, OSError, ValueError):  # it comes and goes
            lock = next((project / "data" / ".work" / ".locks").iterdir())
            if written(project / "data"):
                os.kill(json.loads(lock.read_text())["process"], signal.SIGKILL)
                killed = True
        time.sleep(0.001)
    thread.join()
    return killed and status != [0]


def check_kill(project: Path, stage: str) -> None:
    before = tree(project / "data")
    assert any(killed_while_it_writes(project, stage) for _ in range(5))
    assert left_over(project) != []  # nobody could have removed it
    assert {name: digest for name, digest in tree(project / "data").items() if name in before} == before
    ok(run_stage(project, stage))
    assert left_over(project) == []
    assert without_seconds(tree(project / "data")) == without_seconds(before)


@pytest.mark.slow
def test_a_kill_leaves_the_old_outputs_and_the_next_success_nothing_else(whole: Path) -> None:
    check_kill(whole, "compress")


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fetch", "calibrate", "reference", "select", "compress", "export", "report"])
def test_a_kill_at_every_stage_that_builds_in_scratch_space(whole: Path, stage: str) -> None:
    check_kill(whole, stage)


def spool_and_die(folder: Path) -> None:
    """Hold hidden states in files, and be killed."""
    states = Spool([tiny_tokens(), tiny_tokens()], directory=folder, in_memory=0)
    assert len(states) == 2
    os.kill(os.getpid(), signal.SIGKILL)


def test_hidden_states_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=spool_and_die, args=(tmp_path,))
    process.start()
    process.join()
    (left,) = tmp_path.glob("states-*")
    assert len(list(left.iterdir())) == 2
    states = Spool([tiny_tokens()], directory=tmp_path, in_memory=0)
    assert not left.exists()
    states.close()
    assert list(tmp_path.iterdir()) == []
