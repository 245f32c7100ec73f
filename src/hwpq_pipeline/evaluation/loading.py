"""Loading a checkpoint as a user would, for evaluation.

`AutoModelForCausalLM.from_pretrained(directory)`, nothing else. For a quantized export compressed-tensors
then unpacks the weights to `scale · code` in the dtype asked for, once, on the first forward of the whole
model (a forward of an inner module alone would meet packed weights), and from then on rounds the activations
before every quantized layer: for each token `s = max|x| / 448` (FP8) or `max|x| / 127.5` (INT8),
`x ← s · round(x / s)`. Its option `dequantize=True` (`run_compressed=False`) leaves that rounding out: not
used here, and `open_model` checks that the rounding is in force.

float32 is the default dtype: it holds codes times scales exactly (to one rounding), and a CPU without
bfloat16 arithmetic runs bfloat16 products about seven times slower.

The head (`lm_head`) is taken apart from the body, so that the final hidden states can be multiplied by it in
chunks and only where logits are wanted. That is right only for models whose logits are `hidden · Wᵀ + b`,
which is checked on a few tokens; models that scale or cap their logits are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.errors import HwpqError

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its head apart.

    Attributes:
        model: the causal LM, in evaluation mode, weights unpacked.
        head: `lm_head`'s weight, shape (vocabulary, hidden), float32.
        bias: its bias, shape (vocabulary,), or None.
    """

    model: nn.Module
    head: Tensor
    bias: Tensor | None

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states (what the head multiplies), shape (batch, length, hidden), float32.

        Args:
            token_ids: shape (batch, length), int64.
        """
        body: Any = self.model.base_model
        hidden: Tensor = body(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, shape (…, vocabulary), float32."""
        return torch.nn.functional.linear(hidden, self.head, self.bias)

    def head_digest(self) -> str:
        """Hex SHA-256 of the head's values: two models with the same one have the same head."""
        digest = hashlib.sha256(self.head.contiguous().numpy().data)
        if self.bias is not None:
            digest.update(self.bias.contiguous().numpy().data)
        return digest.hexdigest()


def resolve_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of `auto` (float32), `float32` or `bfloat16`."""
    if dtype not in _DTYPES:
        raise HwpqError(
            f"unknown dtype {dtype!r}",
            where="evaluation dtype",
            remedy=f"Choose one of {', '.join(_DTYPES)}.",
        )
    return _DTYPES[dtype]


def dtype_name(dtype: str) -> str:
    """`float32` or `bfloat16`: what `dtype` comes to."""
    return str(resolve_dtype(dtype)).removeprefix("torch.")


def open_model(directory: str | Path, dtype: str, tokens: Tensor) -> LoadedModel:
    """Load a checkpoint from a local directory and make sure that it computes what it says.

    Args:
        directory: a dense checkpoint or an export.
        dtype: `auto`, `float32` or `bfloat16`.
        tokens: ids that it is going to see, shape (samples, length); it is tried on the first few.

    Raises:
        HwpqError: it does not load, weights are missing, left over or of another shape, ids are outside its
            vocabulary, its logits are not finite or not a linear function of its hidden states, or it should
            round activations and does not.
    """
    model = _load(Path(directory), resolve_dtype(dtype))
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise HwpqError("no language model head", where=str(directory), remedy="Use a causal LM.")
    _check_vocabulary(tokens, head.weight.shape[0], str(directory))
    ids = tokens[:1, :_PROBE_TOKENS]
    with torch.inference_mode():
        with _without_bars():
            logits = model(input_ids=ids, use_cache=False).logits.float()
        bias = getattr(head, "bias", None)
        loaded = LoadedModel(model, head.weight.detach().float(), None if bias is None else bias.detach().float())
        _check_head(loaded, ids, logits, Path(directory))
        _check_activations(loaded, ids, Path(directory))
    return loaded


def _load(directory: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    remedy = "Run the export pipeline for this variant again."
    if not (directory / "config.json").is_file():
        raise HwpqError("no checkpoint there (config.json is missing)", where=str(directory), remedy=remedy)
    try:
        with _without_bars():
            result: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HwpqError(f"transformers cannot load it ({first})", where=str(directory), remedy=remedy) from error
    model, found = result
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if wrong := sorted(map(str, found.get(kind) or ())):
            raise HwpqError(
                f"{len(wrong)} {kind.replace('_', ' ')}, first {wrong[0]}",
                where=str(directory),
                remedy=remedy,
            )
    return model.eval()


def _check_vocabulary(tokens: Tensor, vocabulary: int, where: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise HwpqError(
            f"token ids reach from {low} to {high}, the vocabulary has {vocabulary} entries",
            where=where,
            remedy="Draw the samples with this model's tokenizer.",
        )


def _check_head(loaded: LoadedModel, ids: Tensor, logits: Tensor, directory: Path) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise HwpqError(
            "its logits are NaN or infinite",
            where=str(directory),
            remedy="The weights are damaged or overflow; compress the model again.",
        )
    ours = loaded.logits(loaded.hidden(ids))
    # bfloat16 models round their logits to 8 bits of mantissa; ours stay in float32.
    tolerance = 1e-4 if next(loaded.model.parameters()).dtype == torch.float32 else 2e-2
    allowed = tolerance * float(logits.abs().max() + 1)
    if ours.shape != logits.shape or float((ours - logits).abs().max()) > allowed:
        raise HwpqError(
            "its logits are not lm_head times its hidden states (a scaled or capped head?)",
            where=str(directory),
            remedy="Evaluate models with a plain linear lm_head.",
        )


def _check_activations(loaded: LoadedModel, ids: Tensor, directory: Path) -> None:
    """An export that names a rounding of activations must run it: without it the hidden states differ."""
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


class _NoBars(io.TextIOBase):
    """Passes text on, but for progress bars (they begin with a carriage return) and the line ends after."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if "\r" not in text and text != "\n":
            self.stream.write(text)
        return len(text)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The libraries draw progress bars of their own, which would break the pipeline's."""
    with contextlib.redirect_stderr(_NoBars(sys.stderr)):
        yield
