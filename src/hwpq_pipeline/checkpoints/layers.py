"""Which layers of a model can be compressed, found without its weights.

The model is built from its config on the meta device (shapes, no memory). So any causal LM that transformers knows is
served. The compressible layers are the `nn.Linear` modules inside the decoder blocks, which do nearly all of the
computation. The embeddings and `lm_head` are left out: they are often tied to each other, and pruning them costs far
more quality than it saves.

The decoder blocks are the model's outermost `ModuleList` with as many entries as the config has hidden layers. Nested
lists (experts) belong to their block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hwpq_pipeline.checkpoints.reader import read_json
from hwpq_pipeline.errors import HwpqError, first_line


@dataclass(frozen=True)
class Layer:
    """A compressible linear layer.

    Attributes:
        name: the module's path, as in `model.layers.0.self_attn.q_proj`.
        block: index of its decoder block.
        shape: (out_features, in_features).
    """

    name: str
    block: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class LayerMap:
    """All compressible layers, in module order.

    Attributes:
        blocks_name: path of the decoder blocks' `ModuleList`.
        blocks: number of decoder blocks.
        layers: the layers.
        tied: tensors that are aliases, each with its original: `lm_head.weight` → `model.embed_tokens.weight`.
    """

    blocks_name: str
    blocks: int
    layers: tuple[Layer, ...]
    tied: dict[str, str]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> list[str]:
        """Names of the layers, in module order."""
        return [layer.name for layer in self.layers]

    def in_block(self, block: int) -> tuple[Layer, ...]:
        """The layers of one decoder block."""
        return tuple(layer for layer in self.layers if layer.block == block)


def find_blocks(model: nn.Module, where: str = "model") -> tuple[str, nn.ModuleList]:
    """Path and `ModuleList` of a causal LM's decoder blocks.

    Raises:
        HwpqError: there is none, or there are several.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
        and any(isinstance(part, nn.Linear) for part in module.modules())
    }
    config = getattr(model, "config", None)
    if config is not None and len(outer) > 1:
        text = config.get_text_config(decoder=True)
        depth = getattr(text, "num_hidden_layers", None)
        outer = {name: module for name, module in outer.items() if len(module) == depth}
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise HwpqError(
            f"the decoder blocks are not clear: expected one ModuleList with nn.Linear layers, found {found}",
            where=where,
            remedy="Use a decoder-only causal LM whose blocks are made of nn.Linear (not Conv1D).",
        )
    return next(iter(outer.items()))


def meta_model(path: str | Path) -> nn.Module:
    """The checkpoint's model on the meta device: modules and shapes, no weights.

    Raises:
        HwpqError: the config is missing, is not that of a causal LM, or needs remote code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_json(Path(path) / "config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise HwpqError(
            f"not a causal LM that transformers can build ({first_line(error)})",
            where=f"{path}/config.json",
            remedy="Use an architecture that the installed transformers knows without remote code.",
        ) from error
    return model


def layer_map(path: str | Path) -> LayerMap:
    """The compressible layers of the checkpoint at `path`, in module order.

    Args:
        path: a Hugging Face checkpoint directory; only its `config.json` is read.

    Raises:
        HwpqError: it is no causal LM, or has no linear layers in decoder blocks.
    """
    return map_model(meta_model(path), where=str(path))


def map_model(model: nn.Module, where: str = "model") -> LayerMap:
    """The compressible layers of a model that is already built."""
    name, blocks = find_blocks(model, where)
    layers = tuple(
        Layer(f"{name}.{index}.{inner}", index, (module.out_features, module.in_features))
        for index, block in enumerate(blocks)
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear)
    )
    return LayerMap(name, len(blocks), layers, _tied(model))


def _tied(model: nn.Module) -> dict[str, str]:
    config = getattr(model, "config", None)
    if config is None or not getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None)
    return dict(keys) if isinstance(keys, dict) else {}
