"""A walk that was killed between two blocks goes on with the states that it left, and gives the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hwpq_pipeline.decoder import milestones
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.decoder.walk import final_states
from tests.architectures import save_checkpoint
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(5, 24).split(2)


class Killed(BaseException):
    """In the place of a signal that no process survives."""


def filled(blockwise: BlockwiseModel, met: list[int]) -> BlockwiseModel:
    """The model, which notes the blocks that are filled."""
    real = blockwise.filled
    blockwise.filled = lambda number: (met.append(number), real(number))[1]  # type: ignore[method-assign,func-returns-value]
    return blockwise


def killed_and_resumed(model: Path, folder: Path, at: int) -> tuple[list[torch.Tensor], list[int]]:
    """The states of the second run, and the blocks that it filled."""

    def progress(done: int, _: int) -> None:
        if done == at:
            raise Killed

    def opened() -> BlockwiseModel:
        return BlockwiseModel(model, torch.float32, remedy="r")

    with pytest.raises(Killed):
        list(final_states(opened(), TOKENS, progress=progress, milestones=Milestones(folder)))
    met: list[int] = []
    return list(final_states(filled(opened(), met), TOKENS, milestones=Milestones(folder))), met


@pytest.fixture(autouse=True)
def _keep_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "EVERY", 0.0)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_same_bits_and_no_block_twice(tmp_path: Path, at: int) -> None:
    model = tiny_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=4))
    found, met = killed_and_resumed(model, tmp_path / "work", at)
    whole = list(final_states(BlockwiseModel(model, torch.float32, remedy="r"), TOKENS))
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
    assert met == [0, *range(at, 4)]  # the first for what blocks get beside the states


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phimoe", "gpt_oss", "falcon", "jamba"])  # tuples, routers, windows
def test_other_architectures_too(tmp_path: Path, name: str) -> None:
    save_checkpoint(name, tmp_path / "model")
    found, _ = killed_and_resumed(tmp_path / "model", tmp_path / "work", 1)
    whole = list(final_states(BlockwiseModel(tmp_path / "model", torch.float32, remedy="r"), TOKENS))
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))
