"""Whether the Gram matrices stay on disk: `sums` keeps them, `nothing` keeps their diagonals alone.

They take `4·Σ in²` bytes over the distinct layer inputs: 22 GB for 7 billion weights, some 330 GB for 70. They are made
of the dense model and the tokens alone, so they can be made again. Kept, they cost disk and no time. Not kept, each
stage that needs them runs the dense model once more, a block at a time (`method.dense_sums`). The results are the same
to the byte. `auto` keeps them where they take no more than half of the disk's free space: DVC's cache may hold them a
second time, and models and exports come after them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.errors import HwpqError

KEEP = ("sums", "nothing", "auto")
#: Of the disk's free space, what the matrices may take.
SHARE = 0.5


@dataclass(frozen=True)
class Kept:
    """What is kept of the sums.

    Attributes:
        sums: whether the matrices are.
        told: why, in one line.
    """

    sums: bool
    told: str


def decide(keep: str, layers: Iterable[Layer], folder: str | Path) -> Kept:
    """What is kept of the sums of these layers' inputs.

    Args:
        keep: `sums`, `nothing` or `auto`.
        layers: the compressible ones.
        folder: an existing one, on the disk that would hold the matrices.

    Raises:
        HwpqError: another word.
    """
    if keep not in KEEP:
        raise HwpqError(f"unknown keep {keep}", where="calibration", remedy="Use sums, nothing or auto.")
    needed, free = 4 * squared_inputs(layers), shutil.disk_usage(folder).free
    kept = keep == "sums" or (keep == "auto" and needed <= SHARE * free)
    end = "they are kept" if kept else "they are not kept, and each variant that needs them sums them again"
    size = f"The Gram matrices take some {needed / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB free"
    return Kept(kept, f"{size}. By calibration.keep: {keep} {end}.")


def squared_inputs(layers: Iterable[Layer]) -> int:
    """Σ in² over distinct layer inputs, from shapes and names alone.

    Which layers share an input is known once the model has run. Until then: layers of one module (attention, the
    feed-forward part, one expert) share an input if they are of one width. A module all of whose layers are of one
    width has two inputs, since attention's output projection reads another tensor than q, k and v.
    """
    widths: dict[str, list[int]] = {}
    for layer in layers:
        widths.setdefault(_module(layer.name), []).append(layer.shape[1])
    total = 0
    for found in widths.values():
        distinct = set(found)
        again = found[0] ** 2 if len(distinct) == 1 < len(found) else 0
        total += sum(width**2 for width in distinct) + again
    return total


def _module(name: str) -> str:
    """A layer's module; a stack of experts ends in the expert's number, which is a module of its own."""
    parts = name.split(".")
    return ".".join([*parts[:-2], parts[-1]] if parts[-1].isdigit() else parts[:-1])
