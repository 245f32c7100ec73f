"""A GGUF file of a Llama as a transformers model, to compare what it computes.

Nothing is read but the file. Weights are dequantized by gguf's own reader, and shapes, norms and rotary embeddings
follow the header as llama.cpp follows it (`llama_model::load_hparams`, `ggml_rope_ext`). So a wrong header shows too:

    frequency of pair i  =  freq_base^(−2i / dimension_count) / scaling.factor / rope_freqs[i]

`scaling.factor` is 1 and `rope_freqs` are ones where the file has none. Rows of queries and keys, and their biases, are
put back from neighbouring pairs to halves. A key or a tensor that is not known here is an error: it would change what
llama.cpp computes, and not what is compared. llama.cpp itself rounds activations to 8 bits, which would hide
differences of up to a percent. `tests/engines` holds it against transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

from .comparison import Logits, model_logits

_FROM = "llama."
_SHAPE = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
_ROPE_KEYS = {"rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_REMEDY = "Export the variant again."


def open_gguf(folder: Path) -> Logits:
    """The logits of the one GGUF file in a directory.

    Raises:
        HwpqError: a key or a tensor that is not known here.
    """
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    (file,) = folder.glob("*.gguf")
    reader = GGUFReader(file)
    header = _header(reader, str(file))
    tensors = _tensors(reader, header, str(file))
    factors = tensors.pop("rope_freqs.weight", torch.ones(()))
    config = LlamaConfig(
        **{_SHAPE[key]: value for key, value in header.items() if key in _SHAPE},
        rope_parameters={"rope_type": "default", "rope_theta": header["rope.freq_base"]},
        attention_bias=any("self_attn" in name for name in tensors if name.endswith(".bias")),
        mlp_bias=any("mlp" in name for name in tensors if name.endswith(".bias")),
        tie_word_embeddings="lm_head.weight" not in tensors,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # llama.cpp takes each bias as it finds it
            tensors.setdefault(name, torch.zeros(parameter.shape))
    found = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lost := [*found.unexpected_keys, *empty]:
        raise HwpqError(f"tensor {lost[0]} is missing or too many", where=str(file), remedy=_REMEDY)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.model.rotary_emb.inv_freq = _frequencies(header) / factors
    return model_logits(model.eval())


def _header(reader: Any, where: str) -> dict[str, Any]:
    """The header's keys of the architecture, without its name."""
    if reader.fields["general.architecture"].contents() != "llama":
        raise HwpqError("the architecture is not llama", where=where, remedy=_REMEDY)
    header = {
        key.removeprefix(_FROM): field.contents() for key, field in reader.fields.items() if key.startswith(_FROM)
    }
    known = {*_SHAPE, *_ROPE_KEYS, "attention.value_length"}
    if strange := sorted(set(header) - known):
        raise HwpqError(f"key {_FROM}{strange[0]} has no place in the comparison", where=where, remedy=_REMEDY)
    if not header["attention.key_length"] == header["attention.value_length"] == header["rope.dimension_count"]:
        raise HwpqError("keys, values and rotated features have several sizes", where=where, remedy=_REMEDY)
    if header.get("rope.scaling.type", "linear") != "linear":
        raise HwpqError("the rope scaling is not linear", where=where, remedy=_REMEDY)
    return header


def _frequencies(header: dict[str, Any]) -> Tensor:
    """(head size / 2,) float32 radians a position, before `rope_freqs`."""
    size = header["rope.dimension_count"]
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    frequencies = header["rope.freq_base"] ** -powers / (header.get("rope.scaling.factor") or 1.0)
    return frequencies.float()


def _tensors(reader: Any, header: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors by transformers' names, float32, rows of queries and keys in its order."""
    from gguf import dequantize

    heads = {"attn_q": header["attention.head_count"], "attn_k": header["attention.head_count_kv"]}
    tensors = {}
    for entry in reader.tensors:
        parts = entry.name.split(".")
        value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        if entry.name == "rope_freqs.weight":
            tensors[entry.name] = value
        elif parts[0] in _WHOLE and parts[1:] == ["weight"]:
            tensors[f"{_WHOLE[parts[0]]}.weight"] = value
        elif parts[0] == "blk" and parts[2] in _IN_BLOCK and parts[3] in ("weight", "bias"):
            name = f"model.layers.{parts[1]}.{_IN_BLOCK[parts[2]]}.{parts[3]}"
            tensors[name] = _halves(value, heads[parts[2]]) if parts[2] in heads else value
        else:
            raise HwpqError(f"tensor {entry.name} has no place in the comparison", where=where, remedy=_REMEDY)
    return tensors


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows from neighbours (2j, 2j + 1) to halves (j, j + half), head by head."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
