"""The shapes and constants of a Llama, for formats that write a graph or a header of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError

USE_ANOTHER = "Use the compressed-tensors export for this model."


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's shapes and constants.

    Attributes:
        blocks: number of decoder blocks.
        hidden, feed_forward: widths.
        heads, key_heads: number of heads for queries, and for keys and values.
        head_size: features of a head.
        context: largest number of positions.
        vocabulary: number of tokens.
        epsilon: of the norms.
        theta: base of the rotary angles.
    """

    blocks: int
    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head_size: int
    context: int
    vocabulary: int
    epsilon: float
    theta: float


def read_llama(dense: Checkpoint, wanted: str) -> LlamaShape:
    """A checkpoint's shape, from its config as transformers 4 and 5 write it.

    Args:
        dense: the checkpoint.
        wanted: what is to be written, for errors: `GGUF`.

    Raises:
        HwpqError: it is no Llama with plain rotary embeddings and SiLU.
    """
    config = dense.config
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    found = {
        "model type": (config.get("model_type"), "llama"),
        "rope type": (rope.get("rope_type", "default"), "default"),
        "activation": (config.get("hidden_act", "silu"), "silu"),
    }
    for fact, (value, known) in found.items():
        if value != known:
            raise HwpqError(
                f"no {wanted} for {fact} {value!r}, only for {known!r}",
                where=f"{dense.path}/config.json",
                remedy=USE_ANOTHER,
            )
    heads = config["num_attention_heads"]
    return LlamaShape(
        blocks=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        context=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        epsilon=config["rms_norm_eps"],
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
    )
