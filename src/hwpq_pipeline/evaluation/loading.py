"""A checkpoint loaded as a user loads it, for evaluation.

That is `AutoModelForCausalLM.from_pretrained(directory)` and nothing else. For a quantized export, compressed-tensors
then unpacks the weights to `scale · code` in the dtype asked for. It does this once, on the first forward pass of the
whole model (a forward pass of an inner module alone would meet packed weights). From then on it rounds the activations
before every quantized layer: for each token `s = max|x| / 448` (FP8) or `max|x| / 127.5` (INT8), and
`x ← s · round(x / s)`. Its option `dequantize=True` (`run_compressed=False`) leaves that rounding out. It is not used
here, and `open_model` checks that the rounding is in force.

Use float32. It holds codes times scales exactly (to one rounding), and a CPU without bfloat16 arithmetic runs bfloat16
products about seven times slower.

The head is separated from the body (`head`), so that the final hidden states can be multiplied by it in chunks, and
only where logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import body_of
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.decoder.dtypes import resolve_dtype
from hwpq_pipeline.decoder.head import Head, find_head
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.decoder.tokens import check_vocabulary
from hwpq_pipeline.errors import HwpqError

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its head apart.

    Attributes:
        model: the causal LM, in evaluation mode, weights unpacked.
        head: from its final hidden states to logits.
    """

    model: nn.Module
    head: Head

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states (what the head multiplies), shape (batch, length, hidden), float32.

        Args:
            token_ids: shape (batch, length), int64.
        """
        return _hidden(self.model, token_ids)


def _hidden(model: Any, token_ids: Tensor) -> Tensor:
    hidden: Tensor = body_of(model)(input_ids=token_ids, use_cache=False).last_hidden_state
    return hidden.float()


def evaluation_dtype(dtype: str) -> torch.dtype:
    """The dtype that evaluation runs in: `resolve_dtype` on the CPU.

    Raises:
        HwpqError: an unknown dtype.
    """
    return resolve_dtype(dtype, torch.device("cpu"), where="evaluation.dtype")


def open_model(directory: str | Path, dtype: str, tokens: Tensor) -> LoadedModel:
    """Load a checkpoint from a local directory and check that it computes what it says.

    Args:
        directory: a dense checkpoint or an export.
        dtype: `float32`, `bfloat16` or `auto`.
        tokens: ids that the model is going to see, shape (samples, length). It is tried on the first few.

    Raises:
        HwpqError: it does not load, weights are missing, unused or of another shape, ids are outside its
            vocabulary, its logits are not finite or not a function of its hidden states, or it should round
            activations and does not.
    """
    model = load_causal_lm(directory, evaluation_dtype(dtype), remedy="Run the export pipeline for this variant again.")
    check_vocabulary(tokens, model.get_input_embeddings().weight.shape[0], where=str(directory))
    ids = tokens[:1, :_PROBE_TOKENS]
    with torch.inference_mode():
        with quiet_transformers():
            logits = model(input_ids=ids, use_cache=False).logits.float()
        if not bool(torch.isfinite(logits).all()):
            raise HwpqError(
                "its logits are NaN or infinite",
                where=str(directory),
                remedy="The weights are damaged or overflow; compress the model again.",
            )
        loaded = LoadedModel(model, find_head(model, _hidden(model, ids), logits, str(directory)))
        _check_activations(loaded, ids, Path(directory))
    return loaded


def _check_activations(loaded: LoadedModel, ids: Tensor, directory: Path) -> None:
    """An export whose config rounds activations must do so: without the rounding its hidden states differ."""
    modules = [
        module
        for module in loaded.model.modules()
        if getattr(getattr(module, "quantization_scheme", None), "input_activations", None) is not None
    ]
    written = getattr(loaded.model.config, "quantization_config", None)
    if written is not None and not isinstance(written, dict):
        written = written.to_dict()
    groups = ((written or {}).get("config_groups") or {}).values()
    if not any(group.get("input_activations") for group in groups):
        return
    with_rounding = loaded.hidden(ids)
    for module in modules:
        module.quantization_enabled = False  # type: ignore[assignment]
    without = loaded.hidden(ids)
    for module in modules:
        module.quantization_enabled = True  # type: ignore[assignment]
    if not modules or torch.equal(with_rounding, without):
        raise HwpqError(
            "the activations are not rounded although its config says so",
            where=str(directory),
            remedy="Install transformers and compressed-tensors in the versions of the lock file.",
        )
