"""Token ids that a model can read: a table of integers, all in its vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hwpq_pipeline.errors import HwpqError

#: Bytes of the widest activation of a batch.
WIDEST = 2**26


def token_table(token_ids: torch.Tensor | np.ndarray[Any, Any], *, where: str) -> torch.Tensor:
    """Token ids as an int64 tensor, shape (samples, length).

    Args:
        token_ids: integers of that shape.
        where: what they are for, for errors.

    Raises:
        HwpqError: not a table of integers, or an empty one.
    """
    ids = torch.as_tensor(np.asarray(token_ids))
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise HwpqError(
            f"token ids of shape {tuple(ids.shape)}, {ids.dtype}",
            where=where,
            remedy="Give integers of shape (samples, length).",
        )
    return ids.to(torch.int64)


def check_vocabulary(ids: torch.Tensor, vocabulary: int, *, where: str) -> None:
    """Refuse token ids that a model's vocabulary lacks.

    Args:
        ids: integers of any shape.
        vocabulary: number of entries.
        where: the model, for errors.

    Raises:
        HwpqError: an id below 0 or not below `vocabulary`.
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise HwpqError(
            f"token ids reach from {low} to {high}, the vocabulary has {vocabulary} entries",
            where=where,
            remedy="Draw the samples with this model's own tokenizer.",
        )


def checked_ids(token_ids: torch.Tensor | np.ndarray[Any, Any], model: Any, where: str) -> torch.Tensor:
    """Token ids for a causal LM as an int64 tensor, shape (samples, length).

    Args:
        token_ids: integers of that shape.
        model: has `get_input_embeddings`.
        where: the model, for errors.

    Raises:
        HwpqError: no such table, or an id that the model's vocabulary lacks.
    """
    ids = token_table(token_ids, where=where)
    check_vocabulary(ids, model.get_input_embeddings().weight.shape[0], where=where)
    return ids


def samples_at_once(wanted: int, length: int, width: int) -> int:
    """Samples of a forward pass through one block: as many as wanted, but not more than memory should hold.

    Args:
        wanted: samples.
        length: tokens of a sample.
        width: of the widest activation, in float32 at most. A block has some four of them alive.
    """
    return max(1, min(wanted, WIDEST // (4 * length * width)))
