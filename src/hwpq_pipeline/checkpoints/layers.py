"""Which layers of a model can be compressed, found without its weights.

The model is built from its config on the meta device (shapes, no memory). So any causal LM that transformers knows is
served. The compressible layers are the linear layers inside the decoder blocks (`structure`), which do nearly all of
the computation. The embeddings and the head are left out: they are often tied to each other, and pruning them costs far
more quality than it saves. So are the towers for pictures and sound of a wrapper with a text model inside.

A layer is a matrix of the checkpoint's files, and has their name: engines read those. Where transformers builds another
module tree (experts joined into one stack, say), `conversion` tells where the layer lies there.

The decoder blocks are the text model's outermost `ModuleList` with as many entries as the config has hidden layers.
Nested lists (experts) belong to their block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwpq_pipeline.checkpoints.config import check_config
from hwpq_pipeline.checkpoints.conversion import Source, parameters_of_files, stored_matrices
from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.structure import is_linear, is_rebuilt_when_quantized, linear_weights, reads_its_weight
from hwpq_pipeline.errors import HwpqError, reading


@dataclass(frozen=True)
class Layer:
    """A compressible linear layer.

    Attributes:
        name: as the files have it, as in `model.layers.0.self_attn.q_proj`; an expert of a stack adds its number.
        block: index of its decoder block.
        shape: (out_features, in_features).
        stored: its weight in the checkpoint's files.
        place: its weight in the module tree.
        packs: whether engines find its codes in files: its weight is a tensor of its own, as
            (out_features, in_features), and the engine does not build other modules for quantized files.
        called: whether the model calls the layer as a module of its own. If not, an engine that packs its weight finds
            it missing where the model looks for it, and must unpack it when it loads.
    """

    name: str
    block: int
    shape: tuple[int, int]
    stored: Matrix
    place: Matrix
    packs: bool = True
    called: bool = True


@dataclass(frozen=True)
class LayerMap:
    """All compressible layers, in module order.

    Attributes:
        blocks_name: path of the decoder blocks' `ModuleList`.
        blocks: number of decoder blocks.
        layers: the layers.
        tied: tensors that are aliases, each with its original: `lm_head.weight` → `model.embed_tokens.weight`.
        tables: the input embedding, and the head if it is not tied to it. They are no compressible layers, but may be
            rounded; their block is -1.
    """

    blocks_name: str
    blocks: int
    layers: tuple[Layer, ...]
    tied: dict[str, str]
    tables: tuple[Layer, ...] = ()

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


def find_blocks(model: Any, where: str = "model") -> tuple[str, nn.ModuleList]:
    """Path and `ModuleList` of a causal LM's decoder blocks.

    Raises:
        HwpqError: there is none, or there are several.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists) and any(map(is_linear, module.modules()))
    }
    if len(outer) > 1 and (config := getattr(model, "config", None)) is not None:
        depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        outer = {name: module for name, module in outer.items() if len(module) == depth}
    if len(outer) > 1:  # a tower may be as deep as the text model
        inside = {id(module) for module in text_model(model).modules()}
        outer = {name: module for name, module in outer.items() if id(module) in inside}
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise HwpqError(
            f"the decoder blocks are not clear: expected one ModuleList with linear layers, found {found}",
            where=where,
            remedy="Use a decoder-only causal LM whose blocks are made of linear layers.",
        )
    return next(iter(outer.items()))


def text_model(model: Any) -> nn.Module:
    """The part of a causal LM that turns tokens into hidden states; of a wrapper with towers, its text model."""
    found: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return body_of(model) if found is model else found


def body_of(model: Any) -> nn.Module:
    """A causal LM without its head; of a wrapper, with its towers. Where the model names none, its largest part."""
    if model.base_model is not model:
        found: nn.Module = model.base_model
        return found
    return max(model.children(), key=lambda part: sum(1 for _ in part.modules()))


def meta_model(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The checkpoint's model on the meta device: modules and shapes, no weights.

    Args:
        path: the checkpoint.
        dtype: of its parameters; the config's by default.

    Raises:
        HwpqError: the config is missing, is not that of a causal LM, or needs remote code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_config(path)
    remedy = "Use an architecture that the installed transformers knows without remote code."
    with reading(f"{path}/config.json", what="not a causal LM that transformers can build", remedy=remedy):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            given = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)


def layer_map(path: str | Path) -> LayerMap:
    """The compressible layers of the checkpoint at `path`, in module order.

    Args:
        path: a Hugging Face checkpoint directory; its `config.json` and the headers of its files are read. Without
            files the layers have their names in the module tree.

    Raises:
        HwpqError: it is no causal LM, has no linear layers in decoder blocks, or lacks one of them.
    """
    model = meta_model(path)
    if not any(Path(path).glob("*.safetensors")):
        return map_model(model, where=str(path))
    checkpoint = Checkpoint(path)
    return map_model(model, {name: checkpoint.shape(name) for name in checkpoint.names}, where=str(path))


def map_model(model: Any, files: Mapping[str, tuple[int, ...]] | None = None, where: str = "model") -> LayerMap:
    """The compressible layers of a model that is already built.

    Args:
        model: of transformers.
        files: shapes of the tensors in the checkpoint's files; None if they have the module tree's names.
        where: for errors.

    Raises:
        HwpqError: no decoder blocks, or the files lack a layer.
    """
    name, blocks = find_blocks(model, where)
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    inside: list[tuple[int, Matrix]] = [
        (index, replace(matrix, tensor=f"{name}.{index}.{matrix.tensor}"))
        for index, block in enumerate(blocks)
        for matrix in linear_weights(block, width)
    ]
    tied = tied_parameters(model)
    sources = None if files is None else parameters_of_files(model, files)
    if files is None or sources is None:
        pairs = [(matrix, matrix) for _, matrix in inside]
    else:
        pairs = list(stored_matrices(model, sources, files, [matrix for _, matrix in inside], where))
    block_of = {matrix.tensor: index for index, matrix in inside}
    rebuilt = is_rebuilt_when_quantized(model)
    layers = tuple(
        Layer(
            _name(stored, place),
            block_of[place.tensor],
            place.shape(tuple(model.get_parameter(place.tensor).shape)),
            stored,
            place,
            packs=stored.alone and stored.tensor.endswith(".weight") and not rebuilt,
            called=place.alone and not reads_its_weight(model, place.tensor.removesuffix(".weight")),
        )
        for stored, place in pairs
    )
    return LayerMap(name, len(blocks), layers, tied, tuple(_tables(model, sources, tied)))


def _tables(model: Any, sources: Mapping[str, Source] | None, tied: Mapping[str, str]) -> Iterator[Layer]:
    """The input embedding and the head that are matrices of the files."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        parameter = f"{names.get(id(module))}.weight"
        if module is None or id(module) not in names or parameter in tied:
            continue
        if not isinstance(module, nn.Embedding | nn.Linear):
            continue
        stored = parameter
        if sources is not None:
            source = sources.get(parameter)
            if source is None or source.converter is not None or len(source.patterns) != 1:
                continue
            (stored,) = source.patterns
        name, (rows, columns) = stored.removesuffix(".weight"), module.weight.shape
        packs = not is_rebuilt_when_quantized(model)
        yield Layer(name, -1, (rows, columns), Matrix(stored), Matrix(parameter), packs)


def _name(stored: Matrix, place: Matrix) -> str:
    """The files' name; the module tree's where several layers share a tensor of a file."""
    shared = stored.rows is not None
    name = (place if shared else stored).tensor.removesuffix(".weight")
    part, parts = (place.part, place.parts) if shared else (stored.part, stored.parts)
    return f"{name}.{part}" if parts > 1 else name


def tied_parameters(model: Any) -> dict[str, str]:
    """The model's parameters that are aliases of others, each with its original."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None)
    return dict(keys) if isinstance(keys, dict) else {}
