"""Activation statistics of the dense model in one forward pass, in bounded memory.

All that later stages need from the data is `G = Σ x xᵀ` of each distinct layer input. The pass goes block by block: the
embeddings of all samples once, then each decoder block over all batches, its products watched. A block's weights are
read when its turn comes (`decoder.blockwise`), and its sums are written to disk before the next block starts. Memory
holds one block, its sums, one batch's activations, and the hidden states of all samples until they are too many
(`decoder.spool`).

Where the matrices are not kept (`keep`), they are summed all the same, and their diagonals are written alone, with the
tokens. `Energy` would take half of the time, but it rounds in another order, and the masks could differ from those that
are made where the matrices are kept.

A killed run goes on from the last block, and on a cluster each worker takes a block (`relay`).

In float32 the sums would cost nearly as much as the forward pass, so they use the symmetry (see `decoder.gram`). Larger
batches cost less time, and more memory for one block's activations. Beyond a few thousand tokens a batch nothing is
gained.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from hwpq_pipeline.calibration.keep import decide
from hwpq_pipeline.calibration.relay import Relay
from hwpq_pipeline.calibration.store import InputGroup, Statistics, block_part, gather_statistics
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.writer import atomic_directory
from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.execution.engines import current
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
    work: Path | None = None,
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
        work: a folder of these statistics' own, from which a killed run goes on, and which workers see; None for
            nowhere.

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
        keeping = "sums" if kept.sums or mode == "diagonal" else "nothing"
        folder = partial / "work" if work is None else work
        parts = Parts(folder / keeping)
        if current().workers == 1 or not current().shares_disk:
            _sum_here(walk, parts, mode, keeping, Milestones(folder / "states"), progress)
        else:
            folder = folder.resolve()
            relay = Relay(
                uuid4().hex, folder, Path(model_dir), precision, walk.batch, every_expert, place, mode, keeping
            )
            _sum_by_workers(relay, walk, progress)
        again = {"batch": walk.batch, "every_expert": every_expert} if keeping == "nothing" else {}
        facts = {"dtype": dtype_name(precision), **again}
        gather_statistics(parts, walk.blocks, partial, walk.ids, mode=mode, keep=keeping, **facts)
        if work is None:
            shutil.rmtree(folder)
    return Path(target)


def _sum_here(walk: DenseWalk, parts: Parts, mode: str, keep: str, milestones: Milestones, progress: Progress) -> None:
    """Take all batches through one block after another in this process; a killed walk goes on."""
    hidden = walk.begin(parts.folder)
    whole = next((n for n in range(walk.blocks) if not parts.is_whole(block_part(n))), walk.blocks)
    begin = milestones.restore({"states": hidden}) if milestones.block <= whole else 0
    for number in range(whole if whole == walk.blocks else begin, walk.blocks):
        found = walk.sums(number, hidden, Gram if mode == "gram" else Energy)
        parts.keep(block_part(number), *found.stored(mode, keep))
        if number + 1 < walk.blocks:
            milestones.pass_by(number + 1, {"states": hidden})
        progress(number + 1, walk.blocks)
    hidden.close()


def _sum_by_workers(relay: Relay, walk: DenseWalk, progress: Progress) -> None:
    relay.prepare(walk.ids, walk.blocks)
    try:
        for number in current().map(relay, range(walk.blocks)):
            relay.let_go(number)
            progress(number + 1, walk.blocks)
    except BaseException:
        relay.stop()
        raise
