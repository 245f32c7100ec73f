"""The calibration tokens' way through the dense model: all batches through one decoder block, then through the next.

`calibrate` takes it to write the sums, `compress` takes it again where they were not kept (`method.dense_sums`). Both
must give the same bytes: the same batches, dtype and products. So one class takes the tokens through a block, and what
it needs to know is written beside the sums (`store`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hwpq_pipeline.calibration.blocks import BlockSums
from hwpq_pipeline.calibration.experts import all_experts
from hwpq_pipeline.calibration.store import stored_block
from hwpq_pipeline.checkpoints.json_file import FETCH_AGAIN
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.decoder.blocks import Inputs, first_output, record_inputs
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.decoder.tokens import checked_ids, samples_at_once


@dataclass(frozen=True)
class Summed:
    """The sums of one decoder block's inputs.

    Attributes:
        groups: name and layers of each input group, in module order.
        totals: by the group's name, `Σ x xᵀ` (in, in) or `Σ x_j²` (in,), float32, on the CPU.
        tokens: that reached each group.
    """

    groups: list[tuple[str, list[str]]]
    totals: Mapping[str, torch.Tensor]
    tokens: Mapping[str, int]

    def stored(self, mode: str, keep: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `store.stored_block`."""
        return stored_block(self.groups, self.totals, self.tokens, mode=mode, keep=keep)


class States(Protocol):
    """Hidden states by batch, each (samples, length, hidden)."""

    def __getitem__(self, number: int, /) -> torch.Tensor: ...
    def __setitem__(self, number: int, tensor: torch.Tensor, /) -> None: ...


class DenseWalk:
    """A dense model of which one block at a time has weights, and the tokens that go through it.

    Args:
        model_dir: the dense checkpoint.
        token_ids: (samples, length) integers.
        dtype: of the forward pass.
        batch: samples at a time; fewer where a block's activations would take too much memory.
        every_expert: whether all tokens are summed for every expert, not those that are routed to it (`experts`).
        device: where the forward pass and the sums run.

    Attributes:
        layers: the compressible ones.
        ids: (samples, length) the token ids.
        batch: samples that go at a time.
        blocks: number of decoder blocks.

    Raises:
        HwpqError: token ids out of range, or an unusable model.
    """

    def __init__(
        self,
        model_dir: str | Path,
        token_ids: torch.Tensor | np.ndarray[Any, Any],
        *,
        dtype: torch.dtype,
        batch: int,
        every_expert: bool,
        device: torch.device,
    ) -> None:
        self._blockwise = BlockwiseModel(model_dir, dtype, remedy=FETCH_AGAIN, device=device, head=False)
        self.ids = checked_ids(token_ids, self._blockwise.model, str(model_dir)).to(device)
        self.layers = layer_map(model_dir)
        self.batch = samples_at_once(batch, self.ids.shape[1], max(max(layer.shape) for layer in self.layers))
        self.blocks = len(self._blockwise.blocks)
        self._experts = all_experts if every_expert else _as_routed
        self._extra: list[list[Inputs]] = []

    @torch.inference_mode()
    def begin(self, directory: Path | None = None) -> Spool:
        """The first block's hidden states, a tensor (samples, length, hidden) for each batch. Called once.

        Args:
            directory: where states go that are too many for memory; the system's for temporary files by default.
        """
        hidden, model = Spool(directory=directory), self._blockwise
        with model.filled(0):
            _, self._extra = record_inputs(model.model, model.blocks, self.ids.split(self.batch), hidden)
        model.forget_embedding()
        return hidden

    @torch.inference_mode()
    def sums(self, number: int, hidden: States, kind: type[Gram] | type[Energy]) -> Summed:
        """Take all batches through a block, and sum what its layers are fed.

        Args:
            number: of the block.
            hidden: its states by batch, which the next block's replace.
            kind: which sum.

        Raises:
            HwpqError: a weight cannot be read, an input was NaN or infinite, or experts of another form.
        """
        sums = BlockSums(self.layers, number, kind)
        with (
            self._blockwise.filled(number) as block,
            self._experts(block, sums, f"block {number}"),
            sums.watched(self._blockwise.parameters()),
        ):
            for _ in self._run(number, block, hidden):
                sums.end_batch()
        groups = sums.groups()
        tokens = {name: sums.tokens.get(sums.leader_of.get(name, name), 0) for name, _ in groups}
        return Summed(groups, sums.tensors(groups, self._blockwise.device), tokens)

    @torch.inference_mode()
    def pass_by(self, number: int, hidden: States) -> None:
        """Take all batches through a block of which no sums are wanted; arguments and errors as for `sums`."""
        with self._blockwise.filled(number) as block:
            for _ in self._run(number, block, hidden):
                pass

    def _run(self, number: int, block: nn.Module, hidden: States) -> Iterator[int]:
        for index, inputs in enumerate(self._extra):
            hidden[index] = first_output(inputs[number].run(block, hidden[index]))
            yield index


def _as_routed(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()
