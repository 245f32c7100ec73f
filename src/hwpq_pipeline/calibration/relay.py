"""The sums of a model's blocks by several workers: each takes all batches through a block and hands the states on.

A block's sums need all batches, in order, so that the bytes are those of one process. And a batch needs the block
before it to be done with that batch only. So the blocks are shared out, not the batches: while one worker takes the
third batch through a block, another takes the second through the next block (a pipeline: GPipe, arXiv 1811.06965).
With `n` blocks of `c` batches and `w` workers that takes `n·c/w + w − 1` batches' time in place of `n·c`. Sums stay
with the worker that makes them, and each block's weights are read once.

States are handed on as files, `states/<block>/<batch>.safetensors`. Those before a block stay until its sums are
written: a lost worker's block is begun again from them, and so is the block of a run that was killed.

A worker that waits for states steps aside (`execution.engines.stepped_aside`): the block that it waits for may be the
next in its own queue, after another worker was lost.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hwpq_pipeline.calibration.store import block_part
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_tensors
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.execution.engines import stepped_aside

#: Seconds between two looks for a file, until a waiting worker steps aside, and until it gives up.
LOOK, SHORT, LONG = 0.02, 1.0, 86_400.0
_STOPPED = "stopped"


@dataclass(frozen=True)
class Relay:
    """What workers need to know of a walk; it pickles as names and numbers.

    Attributes:
        key: of the run: a worker opens the model once for it.
        folder: of the run's work, which all workers see. `tokens.safetensors` there has the token ids.
        model: the dense checkpoint.
        dtype: of the forward pass.
        batch: samples at a time.
        every_expert: as for `DenseWalk`.
        device: where workers compute.
        mode: `gram` or `diagonal`.
        keep: whether matrices are written, `sums` or `nothing`.
    """

    key: str
    folder: Path
    model: Path
    dtype: torch.dtype
    batch: int
    every_expert: bool
    device: torch.device
    mode: str
    keep: str

    @property
    def parts(self) -> Parts:
        """The blocks' sums."""
        return Parts(self.folder / self.keep)

    @property
    def states(self) -> Path:
        """The folder of the states."""
        return self.folder / "states"

    def prepare(self, token_ids: Tensor, blocks: int) -> None:
        """Write what workers read. Blocks of a killed run whose states are lost or damaged begin again.

        Args:
            token_ids: (samples, length).
            blocks: of the model.
        """
        number = next((n for n in range(blocks) if not self.parts.is_whole(block_part(n))), blocks)
        batches = -(-len(token_ids) // self.batch)
        if 0 < number < blocks and not all(self._is_readable(number, batch) for batch in range(batches)):
            shutil.rmtree(self.parts.folder)
            shutil.rmtree(self.states, ignore_errors=True)
            self.parts.folder.mkdir()
        write_tensors(self.folder / "tokens.safetensors", {"token_ids": token_ids})
        self.states.mkdir(exist_ok=True)
        (self.states / _STOPPED).unlink(missing_ok=True)

    def stop(self) -> None:
        """Let workers that wait give up: the run has failed."""
        (self.states / _STOPPED).touch()

    def __call__(self, number: int) -> int:
        """Take all batches through a block, and write its sums; the number."""
        name = block_part(number)
        if not self.parts.is_whole(name):
            walk, first = _opened(self)
            piped = Piped(self.states, number, first if number == 0 else None)
            piped.wait_for(0)  # before the block has weights and sums: a call that waits holds nothing
            found = walk.sums(number, piped, Gram if self.mode == "gram" else Energy)
            self.parts.keep(name, *found.stored(self.mode, self.keep))
        return number

    def let_go(self, number: int) -> None:
        """Remove the states before a block that is done."""
        shutil.rmtree(self.states / str(number), ignore_errors=True)

    def _is_readable(self, number: int, batch: int) -> bool:
        try:
            read_tensors(states_file(self.states, number, batch))
        except HwpqError:
            return False
        return True


@lru_cache(maxsize=1)
def _opened(relay: Relay) -> tuple[DenseWalk, Spool]:
    """The model in this process, and the states before the first block."""
    walk = DenseWalk(
        relay.model,
        read_tensors(relay.folder / "tokens.safetensors")["token_ids"],
        dtype=relay.dtype,
        batch=relay.batch,
        every_expert=relay.every_expert,
        device=relay.device,
    )
    return walk, walk.begin()


def states_file(states: Path, number: int, batch: int) -> Path:
    """Where a batch's states before a block are."""
    return states / str(number) / f"{batch}.safetensors"


class Piped:
    """States by batch: those before a block are waited for, those after it are handed on."""

    def __init__(self, states: Path, number: int, first: Spool | None) -> None:
        self.states, self.number, self.first = states, number, first
        (states / str(number + 1)).mkdir(exist_ok=True)

    def __getitem__(self, batch: int) -> Tensor:
        if self.first is not None:
            return self.first[batch]
        self.wait_for(batch)
        return read_tensors(states_file(self.states, self.number, batch))["states"]

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        write_tensors(states_file(self.states, self.number + 1, batch), {"states": tensor})

    def wait_for(self, batch: int) -> None:
        """Return when a batch's states are there; at once before the first block.

        Raises:
            HwpqError: the run has failed, or nothing has come for a very long time.
        """
        there = states_file(self.states, self.number, batch).exists
        if self.first is not None:
            return
        begun = time.monotonic()
        while not there() and time.monotonic() - begun < SHORT:
            time.sleep(LOOK)
        if there():
            return
        with stepped_aside():
            while not there():
                if (self.states / _STOPPED).exists() or time.monotonic() - begun > LONG:
                    raise HwpqError(
                        f"block {self.number} got no states",
                        where="calibrate",
                        remedy="See what the block before it was stopped by, and run the same command again.",
                    )
                time.sleep(LOOK)
