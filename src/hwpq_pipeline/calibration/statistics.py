"""Activation statistics of the dense model in one forward pass, in bounded memory.

All that later stages need from the data is `G = Σ x xᵀ` of each distinct layer input. The pass goes block by block: the
embeddings of all samples once, then each decoder block over all batches, its products watched. A block's weights are
read when its turn comes (`decoder.blockwise`), and its sums are written to disk before the next block starts. Memory
holds one block, its sums, one batch's activations, and the hidden states of all samples until they are too many
(`decoder.spool`).

Where the matrices are not kept (`keep`), they are summed all the same, and their diagonals are written alone, with the
tokens. `Energy` would take half of the time, but it rounds in another order, and the masks could differ from those that
are made where the matrices are kept.

In float32 the sums would cost nearly as much as the forward pass, so they use the symmetry (see `decoder.gram`). Larger
batches cost less time, and more memory for one block's activations. Beyond a few thousand tokens a batch nothing is
gained.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwpq_pipeline.calibration.keep import decide
from hwpq_pipeline.calibration.store import InputGroup, Statistics, StatisticsWriter
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.checkpoints.writer import atomic_directory
from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress

__all__ = ["InputGroup", "Statistics", "collect_statistics"]

logger = logging.getLogger(__name__)


def collect_statistics(  # noqa: PLR0913 (each is a choice of the user)
    model_dir: str | Path,
    token_ids: torch.Tensor | np.ndarray[Any, Any],
    *,
    target: str | Path,
    mode: str = "gram",
    keep: str = "sums",
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
        keep: whether matrices are written: `sums`, `nothing` or `auto` (see `keep`); of mode `gram`.
        dtype: of the forward pass: `float32`, `bfloat16`, or `auto` (bfloat16 where the hardware multiplies it).
        batch: samples at a time; fewer where a block's activations would take too much memory.
        every_expert: whether all tokens are summed for every expert, not those that are routed to it (`experts`).
        device: where the forward pass and the sums run.
        progress: called with (blocks done, blocks).

    Returns:
        The target.

    Raises:
        HwpqError: an unknown mode, keep or dtype, token ids out of range, an unusable model, or activations that are
            NaN or infinite.
    """
    if mode not in ("gram", "diagonal"):
        raise HwpqError(f"unknown mode {mode}", where="calibration", remedy="Use gram or diagonal.")
    if batch < 1:
        raise HwpqError(f"batch is {batch}", where="calibration", remedy="Use 1 or more samples a batch.")
    place = torch.device(device)
    precision = resolve_dtype(dtype, place, where="calibration.dtype")
    walk = DenseWalk(model_dir, token_ids, dtype=precision, batch=batch, every_expert=every_expert, device=place)
    with atomic_directory(target) as partial:
        kept = decide(keep, walk.layers, partial)
        if keep == "auto" and mode == "gram":
            logger.info("%s", kept.told)
        writer = StatisticsWriter(partial, mode, keep="sums" if kept.sums or mode == "diagonal" else "nothing")
        hidden = walk.begin(partial)
        for number in range(walk.blocks):
            found = walk.sums(number, hidden, Gram if mode == "gram" else Energy)
            writer.block(found.groups, found.totals, found.tokens)
            progress(number + 1, walk.blocks)
        hidden.close()
        again = {"batch": walk.batch, "every_expert": every_expert} if writer.keep == "nothing" else {}
        writer.close(walk.ids, dtype=dtype_name(precision), **again)
    return Path(target)
