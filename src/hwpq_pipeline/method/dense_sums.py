"""Gram matrices that were not kept: the dense model runs again, and the sums of one block are there at a time.

A group's matrix is summed when a step asks for it, with all others of its block (`calibration.walk`): the same tokens,
batches and products as in `calibrate`, so the same bytes. The next block's sums take the place of this one's.

**Order.** Groups come in module order, so the walk goes forward once: one forward pass and the sums. The trials of a
budget come from the last block to the first. To begin at the first block for each would take `n²/2` blocks' runs. So a
walk that skips blocks leaves copies of the hidden states on its way, `√n` apart, and one that is sent back starts from
the nearest copy, and leaves some itself: all in all three to four forward passes. Copies are in files.

**Threads and processes.** The walk runs in the thread that asks, which works on the group, and not in the one that
reads ahead: that one reads weights alone. So no more than one block's sums are there, and the sums use the same number
of threads as in `calibrate`. Only one thread walks at a time. In another process `Groups` has a walk of its own, and a
worker that gets some of the groups passes the other blocks by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.sums import AGAIN, StoredSums

#: Of the largest energy, how far an energy that is summed again may be off: another machine rounds otherwise.
FAR = 0.05


class DenseSums:
    """The Gram matrices of a dense model's layer inputs, made when they are asked for.

    Args:
        model: the dense checkpoint.
        statistics: of its inputs, without the matrices.
        device: where the forward pass and the sums run.
    """

    def __init__(self, model: Path, statistics: Statistics, device: torch.device) -> None:
        self.model, self.statistics, self.device = model, statistics, device
        self._lock = Lock()
        self._walk: DenseWalk | None = None
        self._here: tuple[int, Spool] | None = None  # the next block, and its hidden states
        self._copies: dict[int, Spool] = {}
        self._block = -1
        self._grams: Mapping[str, Tensor] = {}

    def gram(self, layer: str) -> Tensor:
        """Σ x xᵀ of a layer's input, shape (in_features, in_features), float32, on the CPU.

        Raises:
            HwpqError: a weight or the tokens cannot be read, or the model's layers share other inputs by now.
        """
        group, block = self.statistics.group_of(layer), self.statistics.block_of(layer)
        with self._lock:
            if block != self._block:
                self._block, self._grams = -1, {}  # let go before the next ones are made
                self._grams = self._summed(block)
                self._block = block
            if group not in self._grams:
                raise HwpqError("the dense model has no such input", where=group, remedy=AGAIN)
            return self._grams[group]

    def _summed(self, block: int) -> Mapping[str, Tensor]:
        at, hidden = self._nearest(block)
        walk = self._walk or self._new_walk()
        hidden = walk.begin() if hidden is None else hidden
        apart = isqrt(block - at) + 1 if block - at > 1 else 0
        for number in range(at, block):
            if apart and (number - at) % apart == 0 and number not in self._copies:
                self._copies[number] = Spool(hidden, in_memory=0)
            walk.pass_by(number, hidden)
        found = walk.sums(block, hidden, Gram)
        self._here = block + 1, hidden
        return found.totals

    def _nearest(self, block: int) -> tuple[int, Spool | None]:
        """Where a walk to a block starts, and the hidden states there; none at the beginning."""
        here, self._here = self._here, None  # a walk that fails leaves them in no block's state
        if here is not None and here[0] <= block:
            self._copies.clear()
            return here
        self._copies = {number: copy for number, copy in self._copies.items() if number <= block}
        if self._copies:
            number = max(self._copies)
            return number, Spool(self._copies[number])
        self._walk = None
        return 0, None

    def _new_walk(self) -> DenseWalk:
        known = self.statistics
        self._walk = DenseWalk(
            self.model,
            known.token_ids(),
            dtype=getattr(torch, known.dtype),
            batch=known.batch,
            every_expert=known.every_expert,
            device=self.device,
        )
        return self._walk


@dataclass(frozen=True)
class SumsAgain(StoredSums):
    """A group's sums: the diagonal as it is stored, the matrix summed again when it is asked for."""

    source: DenseSums

    @cached_property
    def _matrix(self) -> Tensor:
        found, energy = self.source.gram(self.group), self.energy()
        far = (found.diagonal() - energy).abs().max() > FAR * energy.max()
        if bool(far):
            raise HwpqError("the dense model gives other sums than it did in calibrate", where=self.group, remedy=AGAIN)
        return found


def dense_sums(model: Path, statistics: Statistics | None, device: torch.device) -> DenseSums | None:
    """What makes a model's matrices again; None where they are stored, or where there are no statistics."""
    return DenseSums(model, statistics, device) if statistics is not None and statistics.keep == "nothing" else None


def sums_of(group: str, statistics: Statistics | None, dense: DenseSums | None) -> StoredSums | None:
    """What is known of a group's inputs; None without statistics."""
    if statistics is None:
        return None
    return StoredSums(statistics, group) if dense is None else SumsAgain(statistics, group, dense)
