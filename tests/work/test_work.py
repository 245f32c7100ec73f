"""What a killed run goes on from: keys that change with all that a result depends on, folders, locks, milestones."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hwpq_pipeline.checkpoints.parts import Parts, kept_json
from hwpq_pipeline.checkpoints.writer import write_tensors
from hwpq_pipeline.decoder import milestones
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.work import content
from hwpq_pipeline.work.content import tokens_digest, work_key
from hwpq_pipeline.work.folder import forget_work, open_work, result_folder
from hwpq_pipeline.work.locks import held


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_tensors(tmp_path / "model" / "ours.safetensors", {"a": torch.arange(6.0)})
    save_file({"a": torch.arange(6.0)}, tmp_path / "model" / "theirs.safetensors")
    return tmp_path / "model"


def test_the_key_is_the_contents_not_the_place_or_the_time(model: Path, tmp_path: Path) -> None:
    key = work_key({"model": model}, recipe={"a": 1})
    for file in model.iterdir():
        os.utime(file, (1, 1))
    assert work_key({"model": model.rename(tmp_path / "moved")}, recipe={"a": 1}) == key


def test_every_input_and_setting_changes_the_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [work_key({"model": model}, recipe={"a": 1}), work_key({"model": model}, recipe={"a": 2})]
    keys.append(work_key({"other": model}, recipe={"a": 1}))
    for name in ("ours", "theirs"):
        tensors = {"a": torch.arange(6.0) + 1}
        write_tensors(model / f"{name}.safetensors", tensors) if name == "ours" else save_file(
            tensors, model / f"{name}.safetensors"
        )
        keys.append(work_key({"model": model}, recipe={"a": 1}))
    (model / "config.json").write_text('{"a": 1}')
    keys.append(work_key({"model": model}, recipe={"a": 1}))
    (model / "config.json").rename(model / "renamed.json")
    keys.append(work_key({"model": model}, recipe={"a": 1}))
    monkeypatch.setattr(content, "code_version", lambda: "another")
    keys.append(work_key({"model": model}, recipe={"a": 1}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    keys.append(work_key({"model": model}, recipe={"a": 1}))
    assert len(set(keys)) == len(keys)
    with pytest.raises(HwpqError, match="nowhere"):
        work_key({"model": model / "nowhere"})


def test_tokens_of_another_shape_are_others() -> None:
    tokens = torch.arange(8)
    digests = {tokens_digest(tokens.view(2, 4)), tokens_digest(tokens.view(4, 2)), tokens_digest(tokens[None] + 1)}
    assert len(digests) == 3
    assert tokens_digest(tokens.view(2, 4).int()) == tokens_digest(tokens.view(2, 4).numpy())


def test_work_of_another_key_is_removed_and_what_is_done_is_forgotten(tmp_path: Path) -> None:
    (open_work(tmp_path, "compress.v", "one") / "part").touch()
    assert (open_work(tmp_path, "compress.v", "one") / "part").exists()
    other = open_work(tmp_path, "compress.v", "two")
    assert list((tmp_path / "compress.v").iterdir()) == [other]
    (result_folder(other) / "half").touch()
    assert list(result_folder(other).iterdir()) == []
    forget_work(tmp_path, "compress.v")
    forget_work(tmp_path, "compress.v")
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_whole_or_none(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    assert not parts.is_whole("a")
    parts.keep("a", {"x": torch.ones(2)}, {"error": float("nan")})
    parts.keep("empty", {}, {})
    assert parts.is_whole("a")
    assert parts.is_whole("empty")
    assert parts.told("a")["error"] != parts.told("a")["error"]
    assert parts.hand_over("a", tmp_path / "taken")
    assert (tmp_path / "taken").samefile(tmp_path / "parts" / "a.safetensors")
    assert not parts.hand_over("empty", tmp_path / "other")
    (tmp_path / "parts" / "a.json").write_text("{")
    assert not parts.is_whole("a")
    (tmp_path / "parts" / "empty.json").unlink()
    assert not parts.is_whole("empty")


def test_parts_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path / "parts")
    parts.keep("a", {"x": torch.ones(2)}, {})

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    assert parts.hand_over("a", tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == (tmp_path / "parts" / "a.safetensors").read_bytes()


def test_json_is_made_once(tmp_path: Path) -> None:
    made: Iterator[dict[str, int]] = iter([{"n": 1}, {"n": 2}])
    file = tmp_path / "choices.json"
    assert [kept_json(file, lambda: next(made)) for _ in range(2)] == [{"n": 1}] * 2
    file.write_text("{")
    assert kept_json(file, lambda: next(made)) == {"n": 2}


def test_a_walk_goes_on_from_the_last_milestone(tmp_path: Path) -> None:
    time = iter([0.0, milestones.EVERY / 2, milestones.EVERY, milestones.EVERY, 100.0, 100.0])
    states = {name: Spool([torch.full((1, 2, 3), value)]) for name, value in {"dense": 1.0, "compressed": 2.0}.items()}
    walk = Milestones(tmp_path, now=lambda: next(time))
    walk.pass_by(1, states)  # too early
    assert walk.block == 0
    walk.pass_by(2, states)
    states["dense"][0] = torch.full((1, 2, 3), 3.0)
    walk.pass_by(7, states)
    assert [kept.name for kept in tmp_path.iterdir()] == ["7"]
    fresh = {name: Spool([torch.zeros(1, 2, 3)]) for name in states}
    assert Milestones(tmp_path).restore(fresh) == 7
    assert all(torch.equal(fresh[name][0], states[name][0]) for name in states)


def test_a_damaged_milestone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "EVERY", 0.0)
    Milestones(tmp_path).pass_by(3, {"one": Spool([torch.ones(1, 2, 3)]), "two": Spool([torch.ones(1, 2, 3)])})
    file = tmp_path / "3" / "two.0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    fresh = {name: Spool([torch.zeros(1, 2, 3)]) for name in ("one", "two")}
    assert Milestones(tmp_path).restore(fresh) == 0
    assert not any(spool[0].any() for spool in fresh.values())


def _hold(lock: Path, ready: object) -> None:
    with held(lock, "the output"):
        ready.set()  # type: ignore[attr-defined]
        signal.pause()


def test_the_second_writer_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    context, lock = multiprocessing.get_context("spawn"), tmp_path / "locks" / "output"
    ready = context.Event()
    first = context.Process(target=_hold, args=(lock, ready))
    first.start()
    assert ready.wait(60)
    with pytest.raises(HwpqError, match=rf"the output: process {first.pid} on .* \(since 20.*\) is writing it"):
        held(lock, "the output").__enter__()
    first.kill()
    first.join()
    with held(lock, "the output"):
        assert lock.exists()
    assert not lock.exists()
    with held(lock, "the output"):
        pass
