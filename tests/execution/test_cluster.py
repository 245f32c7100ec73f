"""A real Dask cluster of processes: the same bytes whatever works, and whoever is lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.execution import cluster
from hwpq_pipeline.execution.cluster import Dask
from hwpq_pipeline.execution.engines import Local, current, opened
from hwpq_pipeline.method.executor import of_run, serial
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from tests.tiny import tiny_checkpoint, tiny_tokens

pytestmark = pytest.mark.slow
TOKENS = tiny_tokens(16, 32)
RECIPE = Recipe.from_variant(
    {
        "selection": {"structure": "2of4"},
        "recovery": {"preset": "fast"},
        "quantization": {"grid": "int4", "group_size": 32, "method": "coordinate_descent"},
    }
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    tiny_checkpoint(folder / "model")
    collect_statistics(folder / "model", TOKENS, target=folder / "statistics", dtype="float32")
    return folder


def made(root: Path, target: Path) -> dict[str, bytes]:
    target.mkdir()
    write_model(root / "model", root / "statistics", RECIPE, target, name="v", executor=of_run())
    return {file.name: file.read_bytes() for file in target.iterdir()}


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers, started as a user starts them: the address, and their processes."""
    folder = tmp_path_factory.mktemp("scheduler")
    started = [started_scheduler(folder)]
    address = address_in(folder)
    try:
        started += [started_worker(address, folder) for _ in range(2)]
        yield address, started
    finally:
        for process in started:
            process.kill()
            process.wait()


def started_scheduler(folder: Path) -> subprocess.Popen[bytes]:
    command = ["--port", "0", "--no-dashboard", "--no-show", "--scheduler-file", str(folder / "scheduler.json")]
    return quiet("scheduler", *command)


def started_worker(address: str, folder: Path) -> subprocess.Popen[bytes]:
    return quiet("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(folder))


def quiet(*command: str) -> subprocess.Popen[bytes]:
    whole = [sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]]
    return subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def address_in(folder: Path) -> str:
    import json

    file, begun = folder / "scheduler.json", time.monotonic()
    while not file.exists() and time.monotonic() - begun < 60:
        time.sleep(0.1)
    return str(json.loads(file.read_text())["address"])


def test_here_and_on_a_cluster_the_bytes_are_the_same(root: Path, tmp_path: Path, caplog: Any) -> None:
    assert isinstance(current(), Local)
    assert of_run() is serial
    here = made(root, tmp_path / "here")
    with caplog.at_level(logging.INFO), opened("dask", workers=2):
        assert made(root, tmp_path / "there") == here
        assert current().workers == 2
    assert any("2 workers" in record.getMessage() for record in caplog.records)
    assert isinstance(current(), Local)


def _dies_once(marks: str, number: int) -> int:
    """The first call with 3 ends its process in the middle."""
    mark = Path(marks) / "died"
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _fails(number: int) -> int:
    if number == 1:
        raise HwpqError("a weight is infinite", where="layer 1", remedy="Fetch it again.")
    return number


def _logs(number: int) -> int:
    logging.getLogger("hwpq_pipeline.method").warning("worker says %d", number)
    return number


def test_a_lost_workers_work_is_done_again(tmp_path: Path) -> None:
    from functools import partial

    with opened("dask", workers=2) as engine:
        assert list(engine.map(partial(_dies_once, str(tmp_path)), range(8))) == [n * n for n in range(8)]
    assert (tmp_path / "died").exists()


def test_a_workers_error_and_its_log_are_the_runs_own(scheduler: Any, caplog: Any) -> None:
    with opened("dask", scheduler[0]) as engine:
        with pytest.raises(HwpqError, match=r"^layer 1: a weight is infinite\. Fetch it again\.$"):
            list(engine.map(_fails, range(4)))
        with caplog.at_level(logging.WARNING):
            assert list(engine.map(_logs, [5])) == [5]
            begun = time.monotonic()
            while "worker says 5" not in caplog.text and time.monotonic() - begun < 10:
                time.sleep(0.1)
        assert "worker says 5" in caplog.text


def test_another_version_of_the_code_is_refused(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "code_version", lambda: "another")
    with opened("dask", scheduler[0]) as engine, pytest.raises(HwpqError, match="another version"):
        list(engine.map(abs, [1]))


def test_no_scheduler_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    with opened("dask", "tcp://127.0.0.1:9") as engine, pytest.raises(HwpqError, match=r"127\.0\.0\.1:9: no scheduler"):
        list(engine.map(abs, [1]))


def _ends_the_scheduler(process: int, number: int) -> int:
    if number == 1:
        os.kill(process, signal.SIGKILL)
        time.sleep(600)
    return number


def test_a_lost_scheduler_is_told_in_a_line(tmp_path: Path) -> None:
    from functools import partial

    first = started_scheduler(tmp_path)
    address = address_in(tmp_path)
    worker = started_worker(address, tmp_path)
    engine = Dask(address, None)
    try:
        with pytest.raises(HwpqError, match=r"the scheduler is lost.*same command"):
            list(engine.map(partial(_ends_the_scheduler, first.pid), range(3)))
    finally:
        engine.close()
        for process in (first, worker):
            process.kill()
            process.wait()


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(HwpqError, match="local, dask"), opened("spark"):
        pass
