"""A causal LM in memory: the dense model to work on, or an export as a user loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.errors import HwpqError, reading

#: Tensors of a quantized layer. One that is not read means weights that are not there; others may be further heads.
CODES = re.compile(r"\.weight_(packed|scale|shape|zero_point|global_scale)$")


def load_causal_lm(directory: str | Path, dtype: torch.dtype, *, remedy: str) -> Any:
    """The causal LM of a checkpoint, in evaluation mode, on the CPU: `from_pretrained(directory)`, checked.

    The checkpoint may hold tensors that the model does not read (further heads, say), but no codes of that kind.

    Args:
        directory: a dense checkpoint or an export.
        dtype: that it runs in.
        remedy: what the user does about a checkpoint that does not load.

    Raises:
        HwpqError: the checkpoint is not whole, transformers cannot load it, weights are missing or of another shape,
            or codes are not read.
    """
    from transformers import AutoModelForCausalLM

    Checkpoint(directory).check_bytes()  # says in fewer words than transformers what is missing, truncated or flipped
    with reading(directory, what="transformers cannot load it", remedy=remedy), quiet_transformers():
        result: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, found = result
    found = {**found, "unexpected_keys": filter(CODES.search, map(str, found.get("unexpected_keys") or ()))}
    kinds = ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys")
    refuse_keys({kind.replace("_", " "): map(str, found.get(kind) or ()) for kind in kinds}, str(directory), remedy)
    return model.eval()


def refuse_keys(wrong: Mapping[str, Iterable[str]], where: str, remedy: str) -> None:
    """Refuse a checkpoint if anything is wrong with its tensors' names.

    Args:
        wrong: names by what is wrong with them, as in `missing keys`.
        where: the checkpoint.
        remedy: what the user does about it.

    Raises:
        HwpqError: there are such names.
    """
    for kind, names in wrong.items():
        if found := sorted(names):
            raise HwpqError(f"{len(found)} {kind}, first {found[0]}", where=where, remedy=remedy)


def load_dense(model_dir: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The dense causal LM of a checkpoint, in evaluation mode, to work on. Its experts run one by one.

    Args:
        model_dir: the checkpoint. It may hold tensors that the model does not read.
        dtype: that it runs in.
        device: where it runs.

    Raises:
        HwpqError: as `load_causal_lm`.
    """
    keep_freed_memory()
    model = load_causal_lm(model_dir, dtype, remedy="Run the fetch pipeline again.")
    if any(hasattr(module, "is_concatenated") for module in model.modules()):  # experts in transformers' common form
        model.set_experts_implementation("eager")
    return model.to(device)
