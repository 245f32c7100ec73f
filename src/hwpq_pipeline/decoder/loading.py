"""The dense model in memory, and the tokens that it is to be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.errors import HwpqError, first_line


def load_dense(model_dir: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The dense causal LM of a checkpoint, to run.

    Raises:
        HwpqError: the checkpoint is not whole, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    Checkpoint(model_dir)  # transformers' own words for a missing or truncated file are longer
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, trust_remote_code=False, local_files_only=True
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise HwpqError(
            f"transformers cannot load it ({first_line(error)})",
            where=str(model_dir),
            remedy="Run the fetch pipeline again.",
        ) from error
    return model.eval().to(device)


def checked_ids(token_ids: torch.Tensor | np.ndarray[Any, Any], model: Any, where: str) -> torch.Tensor:
    """Token ids as a tensor (samples, length) of integers.

    Raises:
        HwpqError: another shape, or ids that the model's vocabulary lacks.
    """
    ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if ids.ndim != 2 or ids.numel() == 0:
        raise HwpqError(
            f"token ids have shape {tuple(ids.shape)}", where="calibration", remedy="Give (samples, length)."
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise HwpqError(
            f"token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocabulary}",
            where=where,
            remedy="Draw the samples with this model's own tokenizer.",
        )
    return ids
