"""The header of a GGUF file: what it is, and the shapes that llama.cpp builds the model from (see `gguf`)."""

from __future__ import annotations

from typing import Any

from .card import CardInfo
from .gguf_blocks import Array
from .llama import LlamaShape, Rope

#: llama.cpp's word for a file of this type; it made MXFP4 for experts.
_FILES = {"MXFP4": "MXFP4_MOE"}


def add_description(writer: Any, kind: str, card: CardInfo | None) -> None:
    """What the file is, of which type its compressed layers are, and what the card says of it."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{_FILES.get(kind, kind)}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if card is not None:
        writer.add_name(f"{card.base_model} {card.variant}")
        writer.add_description(card.description)
        if card.license:
            writer.add_license(card.license)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, card.base_model)


def add_shape(writer: Any, shape: LlamaShape) -> None:
    """Shapes and constants, by llama.cpp's keys."""
    from gguf import RopeScalingType

    writer.add_block_count(shape.blocks)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope.theta)
    if shape.rope.type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope.factor)
    writer.add_vocab_size(shape.vocabulary)


def rope_factors(rope: Rope) -> Array | None:
    """What llama.cpp divides each frequency by, (head size / 2,) float32; None where it divides by nothing."""
    if rope.type != "llama3":
        return None
    factors: Array = (rope.plain / rope.frequencies).numpy()
    return factors
