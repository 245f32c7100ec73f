"""Statistics of a killed run, and of several workers, are those of one process to the byte."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hwpq_pipeline.calibration import relay
from hwpq_pipeline.calibration.relay import Relay
from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.decoder import milestones
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.execution.engines import Engine, opened
from tests.beyond_linear import mixtral
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

TOKENS = tiny_tokens(6, 32)


class Killed(BaseException):
    """In the place of a signal that no process survives."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("resumed") / "model", tiny_config(num_hidden_layers=5))


def collect(model: Path, target: Path, **options: Any) -> dict[str, bytes]:
    collect_statistics(model, TOKENS, target=target, **{"dtype": "float32", "batch": 2, **options})
    assert not [part for part in target.iterdir() if part.is_dir()]
    return {file.name: file.read_bytes() for file in target.iterdir()}


@pytest.mark.parametrize("keep", ["sums", "nothing"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, keep: str) -> None:
    monkeypatch.setattr(milestones, "EVERY", 0.0)

    def progress(done: int, _: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        collect(model, tmp_path / "out", keep=keep, work=tmp_path / "work", progress=progress)
    assert not (tmp_path / "out").exists()
    summed: list[int] = []
    real = DenseWalk.sums

    def noted(self: DenseWalk, number: int, *rest: Any) -> Any:
        summed.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(DenseWalk, "sums", noted)
    resumed = collect(model, tmp_path / "out", keep=keep, work=tmp_path / "work")
    assert resumed == collect(model, tmp_path / "whole", keep=keep)
    assert summed[: 5 - at] == list(range(at, 5))
    assert len(summed) == 5 - at + 5


def _dies_once(mark: Path, relay: Relay, number: int) -> int:
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return relay(number)


class Losing:
    """The workers of an engine, one of which is killed."""

    def __init__(self, engine: Engine, mark: Path) -> None:
        self.engine, self.mark, self.workers, self.shares_disk = engine, mark, engine.workers, True

    def map(self, function: Any, items: Any) -> Any:
        return self.engine.map(partial(_dies_once, self.mark, function), items)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_hand_the_states_on(model: Path, tmp_path: Path, workers: int) -> None:
    tiny_model(mixtral()).save_pretrained(tmp_path / "experts")
    with opened("dask", workers=workers):
        for path in (model, tmp_path / "experts"):
            work = tmp_path / f"work-{path.name}"
            shared = collect(path, tmp_path / f"shared-{path.name}", work=work)
            left = [states.name for states in (work / "states").glob("*")]
            assert left == ([] if workers == 1 else [str(len(list(work.glob("sums/*.json"))))])  # of no block
    for path in (model, tmp_path / "experts"):
        alone = collect(path, tmp_path / f"alone-{path.name}")
        assert alone == {file.name: file.read_bytes() for file in (tmp_path / f"shared-{path.name}").iterdir()}
    assert shared == alone


@pytest.mark.slow
def test_a_lost_workers_block_is_begun_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("dask", workers=2) as engine:
        losing = Losing(engine, tmp_path / "mark")
        monkeypatch.setattr("hwpq_pipeline.calibration.statistics.current", lambda: losing)
        found = collect(model, tmp_path / "lost", work=tmp_path / "work")
    assert (tmp_path / "mark").exists()
    monkeypatch.undo()
    assert found == collect(model, tmp_path / "alone")


@pytest.mark.slow
def test_where_a_block_fails_those_that_wait_give_up(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with opened("dask", workers=2) as engine, pytest.raises(HwpqError, match="NaN or infinite"):
        collect(damaged(model, tmp_path), tmp_path / "out", work=work)
    assert engine.workers >= 1
    assert not (tmp_path / "out").exists()


def damaged(model: Path, folder: Path) -> Path:
    """The model with weights in its second block that make its activations infinite."""
    target = folder / "damaged"
    shutil.copytree(model, target)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_wait_ends_when_the_run_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "SHORT", 0.0)
    (tmp_path / "stopped").touch()
    with pytest.raises(HwpqError, match="block 3 got no states"):
        relay.Piped(tmp_path, 3, None)[0]
