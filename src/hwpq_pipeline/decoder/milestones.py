"""Hidden states before a decoder block, on disk: where a walk through a model goes on after it was killed.

A walk's state between two blocks is the hidden states of all tokens, and nothing else. They are written when at least
`EVERY` seconds have passed since the last time, so that small blocks are not slowed down, and a kill costs one block or
those seconds, whichever is longer. Only the last milestone is kept.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_tensors
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.errors import HwpqError

#: Seconds of work that may be lost, if a block takes less.
EVERY = 5.0


class Milestones:
    """The states that a walk keeps.

    Args:
        folder: where they are written.
        now: gives seconds.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.now = folder, now
        self._last = now()

    @property
    def block(self) -> int:
        """The decoder block that the walk goes on with; 0 if it begins."""
        return max((int(kept.name) for kept in self.folder.glob("*") if kept.name.isdigit()), default=0)

    def restore(self, spools: Mapping[str, Spool]) -> int:
        """Replace the states by those before `block`; the block. Damaged ones are as good as none.

        Args:
            spools: that hold the states before the first block.
        """
        block = self.block
        names = [(name, number) for name, spool in spools.items() for number in range(len(spool))]
        try:
            for name, number in names if block else ():
                self._read(block, name, number)
        except HwpqError:
            return 0
        for name, number in names if block else ():
            spools[name][number] = self._read(block, name, number).to(spools[name][number].device)
        return block

    def _read(self, block: int, name: str, number: int) -> Tensor:
        return read_tensors(self.folder / str(block) / f"{name}.{number}.safetensors")["states"]

    def pass_by(self, block: int, spools: Mapping[str, Spool]) -> None:
        """Keep the states before a block, if it is time. What came before must be written by now."""
        if self.now() - self._last < EVERY:
            return
        with atomic_directory(self.folder / str(block)) as partial:
            for name, spool in spools.items():
                for number, states in enumerate(spool):
                    write_tensors(partial / f"{name}.{number}.safetensors", {"states": states})
        for kept in self.folder.iterdir():
            if kept.name != str(block):
                shutil.rmtree(kept, ignore_errors=True)
        self._last = self.now()
