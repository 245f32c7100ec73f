"""Activation statistics of the dense model in one forward pass, in bounded memory.

All that later stages need from the data is `G = Σ x xᵀ` of each distinct layer input. The pass goes block by block: the
embeddings of all samples once, then each decoder block over all batches, its products watched. A block's weights are
read when its turn comes (`decoder.blockwise`), and its sums are written to disk before the next block starts. Memory
holds one block, its sums, one batch's activations, and the hidden states of all samples until they are too many
(`decoder.spool`).

In float32 the sums would cost nearly as much as the forward pass, so they use the symmetry (see `decoder.gram`). Larger
batches cost less time, and more memory for one block's activations. Beyond a few thousand tokens a batch nothing is
gained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwpq_pipeline.calibration.blocks import BlockSums
from hwpq_pipeline.calibration.experts import all_experts
from hwpq_pipeline.calibration.store import InputGroup, Statistics, StatisticsWriter
from hwpq_pipeline.checkpoints.json_file import FETCH_AGAIN
from hwpq_pipeline.checkpoints.layers import LayerMap, layer_map
from hwpq_pipeline.checkpoints.writer import atomic_directory
from hwpq_pipeline.decoder.blocks import first_output, record_inputs
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.decoder.tokens import checked_ids, samples_at_once
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress

__all__ = ["InputGroup", "Statistics", "collect_statistics"]


def collect_statistics(  # noqa: PLR0913 (each is a choice of the user)
    model_dir: str | Path,
    token_ids: torch.Tensor | np.ndarray[Any, Any],
    *,
    target: str | Path,
    mode: str = "gram",
    dtype: str = "auto",
    batch: int = 8,
    every_expert: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Path:
    """Sum `x xᵀ` over tokens for every distinct input of the compressible layers.

    Args:
        model_dir: the dense checkpoint.
        token_ids: shape (samples, length), integers.
        target: the directory to write (see `store`), whole or not at all.
        mode: `gram`, or `diagonal` for `Σ x_j²` alone.
        dtype: of the forward pass: `float32`, `bfloat16`, or `auto` (bfloat16 where the hardware multiplies it).
        batch: samples at a time; fewer where a block's activations would take too much memory.
        every_expert: whether all tokens are summed for every expert, not those that are routed to it (`experts`).
        device: where the forward pass and the sums run.
        progress: called with (blocks done, blocks).

    Returns:
        The target.

    Raises:
        HwpqError: an unknown mode or dtype, token ids out of range, an unusable model, or activations that are NaN or
            infinite.
    """
    if mode not in ("gram", "diagonal"):
        raise HwpqError(f"unknown mode {mode}", where="calibration", remedy="Use gram or diagonal.")
    if batch < 1:
        raise HwpqError(f"batch is {batch}", where="calibration", remedy="Use 1 or more samples a batch.")
    place = torch.device(device)
    precision = resolve_dtype(dtype, place, where="calibration.dtype")
    blockwise = BlockwiseModel(model_dir, precision, remedy=FETCH_AGAIN, device=place, head=False)
    ids = checked_ids(token_ids, blockwise.model, str(model_dir)).to(place)
    plan = layer_map(model_dir)
    at_once = samples_at_once(batch, ids.shape[1], max(max(layer.shape) for layer in plan))
    with torch.inference_mode(), atomic_directory(target) as partial:
        writer = StatisticsWriter(partial, mode)
        every = all_experts if every_expert else _as_routed
        _walk(blockwise, plan, ids.split(at_once), writer, every, progress)
        writer.close(ids.numel(), dtype=dtype_name(precision))
    return Path(target)


def _as_routed(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _walk(
    blockwise: BlockwiseModel,
    plan: LayerMap,
    batches: Sequence[torch.Tensor],
    writer: StatisticsWriter,
    experts: Callable[..., AbstractContextManager[None]],
    progress: Progress,
) -> None:
    """Take all batches through one block after another, and write each block's sums."""
    hidden = Spool(directory=writer.directory)
    with blockwise.filled(0):
        _, extra = record_inputs(blockwise.model, blockwise.blocks, batches, hidden)
    blockwise.forget_embedding()
    for number in range(len(blockwise.blocks)):
        sums = BlockSums(plan, number, Gram if writer.mode == "gram" else Energy)
        with (
            blockwise.filled(number) as block,
            experts(block, sums, f"block {number}"),
            sums.watched(blockwise.parameters()),
        ):
            for index, inputs in enumerate(extra):
                hidden[index] = first_output(inputs[number].run(block, hidden[index]))
                sums.end_batch()
        groups = sums.groups()
        tokens = {name: sums.tokens.get(sums.leader_of.get(name, name), 0) for name, _ in groups}
        writer.block(groups, sums.tensors(groups, blockwise.device), tokens)
        progress(number + 1, len(blockwise.blocks))
    hidden.close()
