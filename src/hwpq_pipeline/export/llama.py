"""The shapes and constants of a Llama, for formats that write a graph or a header of their own.

They are those of the model that transformers builds from `config.json`, and not the entries of that file. Configs state
the same thing in several ways (`rope_scaling` or `rope_parameters`, `type` or `rope_type`, left out or null), and only
what transformers makes of them was evaluated. The rotary frequencies are the numbers of its rotary module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError

USE_ANOTHER = "Use the compressed-tensors export for this model."
#: Rope types whose frequencies depend on nothing but the config. `dynamic` and `longrope` change them with the length.
FIXED_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: feature pair `i` of a head turns by `position · frequencies[i]`.

    Attributes:
        type: transformers' word for the scaling: `default`, `linear`, `llama3` or `yarn`.
        theta: base of the angles.
        factor: by which the scaling stretches positions; 1 without scaling.
        frequencies: (head size / 2,) float32, radians a position, with the scaling in them.
        amplitude: that cosines and sines are multiplied by (transformers' `attention_scaling`).
    """

    type: str
    theta: float
    factor: float
    frequencies: Tensor
    amplitude: float

    @property
    def plain(self) -> Tensor:
        """The frequencies without scaling, as transformers computes them: (head size / 2,) float32."""
        size = 2 * len(self.frequencies)
        return 1.0 / (self.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))


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
        rope: rotary position embeddings.
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
    rope: Rope


def read_llama(dense: Checkpoint, wanted: str, ropes: Sequence[str]) -> LlamaShape:
    """A checkpoint's shape, from the model that transformers builds of it.

    Args:
        dense: the checkpoint.
        wanted: what is to be written, for errors: `GGUF`.
        ropes: rope types that it holds.

    Raises:
        HwpqError: it is no Llama with SiLU and one of these rope types.
    """
    where = f"{dense.path}/config.json"
    _check("model type", dense.config.get("model_type"), ("llama",), wanted, where)
    model: Any = meta_model(dense.path)
    config = model.config
    _check("activation", config.hidden_act, ("silu",), wanted, where)
    stated = config.rope_parameters
    _check("rope type", stated["rope_type"], ropes, wanted, where)
    rotary = type(model.model.rotary_emb)(config=config)  # the meta model's own has no numbers
    rope = Rope(
        type=stated["rope_type"],
        theta=float(stated["rope_theta"]),
        factor=float(stated.get("factor") or 1.0),
        frequencies=rotary.inv_freq.float(),
        amplitude=float(rotary.attention_scaling),
    )
    turned = 2 * len(rope.frequencies)
    _check("heads with rotated numbers", turned, (config.head_dim,), wanted, where)
    return LlamaShape(
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        rope=rope,
    )


def _check(fact: str, value: object, known: Sequence[object], wanted: str, where: str) -> None:
    if value not in known:
        raise HwpqError(
            f"no {wanted} for {fact} {value!r}, only for {', '.join(map(repr, known))}",
            where=where,
            remedy=USE_ANOTHER,
        )
