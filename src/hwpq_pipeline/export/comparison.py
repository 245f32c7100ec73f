"""What a further format computes, compared with the compressed-tensors export before it is kept.

The compressed-tensors export is the one that is evaluated. Its weights are `scale · code`. So the reference is the
dense model in float32 with these weights in it, which transformers loads from the dense config. A format's export is
run again from its files alone (`ReadBack.open`). Both compute the logits `z` of the same random tokens, and at every
compared token

    ‖z_export − z_reference‖ / ‖z_reference‖ ≤ bound

The bound is the format's own, and follows from its rounding. Rounding of activations is in neither: it belongs to the
engine.

Two prompts are run. The short one has 16 tokens, all compared. Of the long one the last 64 are compared, where a rope
scaling shows most. It has 512 tokens; with a rope scaling 64 more than the scaling's original length, or 4,200 at
most. A long prompt takes two floating-point operations a weight and token, so it is shorter for large models: as many
tokens as 5e11 operations (some seconds of two cores) pay for, and 128 at least.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.conversion import parameters_of_files
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.errors import HwpqError, first_line

SHORT, KEPT = 16, 64
LONG, PAST, LONGEST, SHORTEST = 512, 64, 4_200, 128
OPERATIONS = 5e11
#: What configs call their largest number of positions.
_CONTEXT = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
#: Bound where codes, scales and other weights keep their values: what is left is the order of float32 sums.
EXACT = 1e-3
#: (1, length) token ids and a number n to the logits of the last n tokens, (n, vocabulary) float32.
Logits = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class ReadBack:
    """How a format's export is run again.

    Attributes:
        open: from the export's directory to its logits. It reads nothing else.
        bound: the largest relative difference of a token's logits, for these sources.
    """

    open: Callable[[Path], Logits]
    bound: Callable[[Checkpoint, CompressedModel], float]


def exact(_dense: Checkpoint, _compressed: CompressedModel) -> float:
    """The bound of a format that keeps every value."""
    return EXACT


def compare(
    read_back: ReadBack, folder: Path, dense: Checkpoint, compressed: CompressedModel, *, name: str, where: str
) -> None:
    """Refuse an export that computes something else than the compressed-tensors export.

    Args:
        read_back: of its format.
        folder: the export.
        dense: the dense checkpoint that it was made from.
        compressed: the compressed model that it was made from.
        name: the format's.
        where: what errors name.

    Raises:
        HwpqError: a token's logits are off by more than the bound, or the export cannot be run.
    """
    again = "Nothing was written. Use another format for this variant, and report this as a fault of the exporter."
    with quiet_transformers(), torch.inference_mode():
        try:
            prompts, wanted = _reference(dense, compressed)
            found = _run(read_back.open(folder), prompts)
        except HwpqError as error:
            said = f"the {name} export cannot be compared ({error.what})"
            raise HwpqError(said, where=where, remedy=error.remedy) from error
        except Exception as error:  # whatever a runtime raises: it cannot run the export
            said = f"the {name} export cannot be compared ({first_line(error)})"
            raise HwpqError(said, where=where, remedy=again) from error
    bound = read_back.bound(dense, compressed)
    for prompt, expected, got in zip(prompts, wanted, found, strict=True):
        far = (got - expected).norm(dim=1) / expected.norm(dim=1)
        worst = int(far.nan_to_num(torch.inf).argmax())
        if not float(far[worst]) <= bound:
            token = prompt.shape[1] - len(far) + worst
            raise HwpqError(
                f"the {name} export's logits at token {token} of {prompt.shape[1]} differ from the compressed-tensors "
                f"export's by {float(far[worst]):.2g} of their norm, and {bound:.2g} is its bound",
                where=where,
                remedy=again,
            )


def _reference(dense: Checkpoint, compressed: CompressedModel) -> tuple[list[Tensor], list[Tensor]]:
    """The prompts, and the reference's logits."""
    model = load_dense(dense.path, torch.float32, torch.device("cpu"))
    found = layer_map(dense.path)
    for layer in (*found, *found.tables):
        if layer.name in compressed.layers or layer.name in compressed.embeddings:
            place = layer.place.of(model.get_parameter(layer.place.tensor).data)
            place.copy_(compressed.dequantized(layer.name, layer.shape, dense.tensor_dtype(layer.stored.tensor)))
    if replaced := compressed.replaced():  # norms of a healed model
        for name, source in parameters_of_files(model, dense.names).items():
            stored = next(iter(source.patterns))
            if stored in replaced:
                model.get_parameter(name).data.copy_(replaced[stored].to(dense.tensor_dtype(stored)))
    prompts = _prompts(model)
    logits = _run(model_logits(model), prompts)
    model.to("meta")  # its weights' memory is free before the export's own model is loaded
    return prompts, logits


def model_logits(model: Any) -> Logits:
    """A transformers model's `Logits`."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(ids: Tensor, kept: int) -> Tensor:
        options = {"logits_to_keep": kept} if keeps else {}
        result: Tensor = model(input_ids=ids, use_cache=False, **options).logits[0, -kept:].float()
        return result

    return logits


def _run(logits: Logits, prompts: list[Tensor]) -> list[Tensor]:
    return [logits(prompt, min(prompt.shape[1], KEPT)) for prompt in prompts]


def _prompts(model: Any) -> list[Tensor]:
    """The short and the long prompt, (1, length) int64 each."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config(decoder=True)
    longest = long_length(config, model.num_parameters())
    tokens = model.get_input_embeddings().num_embeddings
    return [torch.randint(tokens, (1, length), generator=generator) for length in (min(SHORT, longest), longest)]


def long_length(config: Any, parameters: int) -> int:
    """Tokens of the long prompt.

    Args:
        config: the text model's.
        parameters: of the model.
    """
    context = next((value for name in _CONTEXT if (value := getattr(config, name, None))), LONG)
    stated = getattr(config, "rope_parameters", None) or {}
    entries = [stated, *(entry for entry in stated.values() if isinstance(entry, dict))]
    scaled = [entry for entry in entries if entry.get("rope_type", "default") != "default"]
    wanted = LONG
    if scaled:
        wanted = max(int(entry.get("original_max_position_embeddings") or context) for entry in scaled) + PAST
    paid = max(SHORTEST, int(OPERATIONS / (2 * parameters)))
    return min(wanted, LONGEST, context, paid)
