"""A checkpoint run as a user runs it, for evaluation, one decoder block in memory.

A user's `AutoModelForCausalLM.from_pretrained(directory)` builds the modules of compressed-tensors for a quantized
export, and unpacks the weights to `scale · code` in the dtype asked for. From then on it rounds the activations before
every quantized layer: for each token `s = max|x| / 448` (FP8) or `max|x| / 127.5` (INT8), and `x ← s · round(x / s)`.
`decoder.blockwise` does the same a block at a time. compressed-tensors' option `dequantize=True`
(`run_compressed=False`) leaves that rounding out. It is not used here, and `open_blockwise` checks that the rounding is
in force.

Use float32. It holds codes times scales exactly (to one rounding), and a CPU without bfloat16 arithmetic runs bfloat16
products about seven times slower.

The head is separated from the body (`decoder.head`), so that the final hidden states can be multiplied by it in chunks,
and only where logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.decoder.blocks import first_output, record_inputs
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.dtypes import resolve_dtype
from hwpq_pipeline.decoder.head import Head, answered_logits, find_head
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.decoder.tokens import check_vocabulary
from hwpq_pipeline.decoder.walk import final_states
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress

_AGAIN = "Run the export pipeline for this variant again."
_PROBE_TOKENS = 8


def evaluation_dtype(dtype: str) -> torch.dtype:
    """The dtype that evaluation runs in: `resolve_dtype` on the CPU.

    Raises:
        HwpqError: an unknown dtype.
    """
    return resolve_dtype(dtype, torch.device("cpu"), where="evaluation.dtype")


def open_model(directory: str | Path, dtype: str, tokens: Tensor) -> Any:
    """Load a checkpoint whole, as a user does, and try it.

    Args:
        directory: a dense checkpoint or an export.
        dtype: `float32`, `bfloat16` or `auto`.
        tokens: ids that the model is going to see, shape (samples, length). It is tried on the first few.

    Raises:
        HwpqError: it does not load, weights are missing, unused or of another shape, ids are outside its vocabulary, or
            its logits are not finite.
    """
    model = load_causal_lm(directory, evaluation_dtype(dtype), remedy=_AGAIN)
    check_vocabulary(tokens, model.get_input_embeddings().weight.shape[0], where=str(directory))
    with torch.inference_mode(), quiet_transformers():
        logits = model(input_ids=tokens[:1, :_PROBE_TOKENS], use_cache=False).logits
    _check_finite(logits, str(directory))
    return model


def open_blockwise(directory: str | Path, dtype: str, tokens: Tensor) -> BlockwiseModel:
    """Open a checkpoint to be run a decoder block at a time, and check that it computes what it says.

    Args:
        directory, dtype, tokens: as for `open_model`.

    Raises:
        HwpqError: as `open_model`, or it should round activations and does not.
    """
    blockwise = BlockwiseModel(directory, evaluation_dtype(dtype), remedy=_AGAIN)
    check_vocabulary(tokens, blockwise.model.get_input_embeddings().weight.shape[0], where=str(directory))
    with torch.inference_mode():
        _check_activations(blockwise, tokens[:1, :_PROBE_TOKENS], str(directory))
    return blockwise


def run_blockwise(
    blockwise: BlockwiseModel,
    tokens: Tensor,
    batch: int,
    progress: Progress = no_progress,
    milestones: Milestones | None = None,
) -> tuple[Head, Iterator[Tensor]]:
    """Take all tokens through the model's body.

    Args:
        blockwise: from `open_blockwise`.
        tokens: ids, shape (samples, length).
        batch: samples in a forward pass.
        progress: called with (blocks done, blocks).
        milestones: where a killed run goes on from; None for nowhere.

    Returns:
        Its head, and the final hidden states (what the head multiplies) of each batch, shape (samples, length, hidden),
        float32.

    Raises:
        HwpqError: a weight cannot be read, or the logits are not finite or no function of the hidden states.
    """
    states = final_states(blockwise, tokens.split(batch), progress=progress, milestones=milestones)
    first = next(states)
    model, where, probe = blockwise.model, str(blockwise.checkpoint.path), first[:1, :_PROBE_TOKENS]
    with torch.inference_mode():
        logits = answered_logits(model, probe)
        _check_finite(logits, where)
        head = find_head(model, probe, logits, where)
    return head, chain([first], states)


def _check_finite(logits: Tensor, where: str) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise HwpqError(
            "its logits are NaN or infinite",
            where=where,
            remedy="The weights are damaged or overflow; compress the model again.",
        )


def _check_activations(blockwise: BlockwiseModel, ids: Tensor, where: str) -> None:
    """An export whose config rounds activations must do so: without the rounding a block's output differs."""
    config = blockwise.checkpoint.config.get("quantization_config") or {}
    if not any(group.get("input_activations") for group in (config.get("config_groups") or {}).values()):
        return
    rounding: dict[int, list[Any]] = {
        number: [
            module
            for module in block.modules()
            if getattr(getattr(module, "quantization_scheme", None), "input_activations", None) is not None
        ]
        for number, block in enumerate(blockwise.blocks)
    }
    number = next((number for number, modules in rounding.items() if modules), None)
    if number is None or not _differs(blockwise, number, rounding[number], ids):
        raise HwpqError(
            "the activations are not rounded although its config says so",
            where=where,
            remedy="Install transformers and compressed-tensors in the versions of the lock file.",
        )


def _differs(blockwise: BlockwiseModel, number: int, modules: list[Any], ids: Tensor) -> bool:
    """Whether a block gives something else when its modules round their inputs than when they do not."""
    with blockwise.filled(0):
        (state,), (extra,) = record_inputs(blockwise.model, blockwise.blocks, [ids])
    outputs = []
    with blockwise.filled(number) as block:
        for rounds in (True, False):
            for module in modules:
                module.quantization_enabled = rounds
            outputs.append(first_output(extra[number].run(block, state)))
        for module in modules:
            module.quantization_enabled = True
    return not torch.equal(*outputs)
