"""A causal LM in memory: the dense model to work on, or an export as a user loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.errors import HwpqError, first_line


def load_causal_lm(directory: str | Path, dtype: torch.dtype, *, remedy: str, allow_unused: bool = False) -> Any:
    """The causal LM of a checkpoint, in evaluation mode, on the CPU: `from_pretrained(directory)`, checked.

    Args:
        directory: a dense checkpoint or an export.
        dtype: that it runs in.
        remedy: what the user does about a checkpoint that does not load.
        allow_unused: whether the checkpoint may hold tensors that the model does not read.

    Raises:
        HwpqError: the checkpoint is not whole, transformers cannot load it, or weights are missing, unused or of
            another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    Checkpoint(directory)  # says in fewer words than transformers what is missing or truncated
    try:
        with quiet_transformers():
            result: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise HwpqError(
            f"transformers cannot load it ({first_line(error)})", where=str(directory), remedy=remedy
        ) from error
    model, found = result
    kinds = ("missing_keys", "mismatched_keys", "error_msgs") + (() if allow_unused else ("unexpected_keys",))
    for kind in kinds:
        if wrong := sorted(map(str, found.get(kind) or ())):
            raise HwpqError(
                f"{len(wrong)} {kind.replace('_', ' ')}, first {wrong[0]}", where=str(directory), remedy=remedy
            )
    return model.eval()


def load_dense(model_dir: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The dense causal LM of a checkpoint, in evaluation mode, to work on.

    Args:
        model_dir: the checkpoint. It may hold tensors that the model does not read.
        dtype: that it runs in.
        device: where it runs.

    Raises:
        HwpqError: as `load_causal_lm`.
    """
    keep_freed_memory()
    return load_causal_lm(model_dir, dtype, remedy="Run the fetch pipeline again.", allow_unused=True).to(device)
