"""A model's shapes, read from its `config.json` alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hwpq_pipeline.calibration.keep import squared_inputs
from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, layer_map, meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.groups import LARGE


@dataclass(frozen=True)
class Shapes:
    """A model's shapes.

    Attributes:
        layers: the compressible ones.
        others: parameters outside of them.
        tables: rows and columns of the embedding, and of the head if it is not tied to it.
        head: parameters of the product that gives the logits.
        item: bytes of a number that is not rounded.
        side_bytes: of the files beside the weights (tokenizer, config), which every export copies.
    """

    layers: tuple[Layer, ...]
    others: int
    head: int
    tables: tuple[tuple[int, int], ...] = ()
    item: int = 2
    side_bytes: int = 0

    @property
    def weights(self) -> int:
        """Weights of the compressible layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.weights + self.others

    @property
    def block(self) -> int:
        """Weights of the compressible layers of the largest decoder block."""
        blocks: dict[int, int] = {}
        for layer in self.layers:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.shape[0] * layer.shape[1]
        return max(blocks.values(), default=0)

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return len({layer.block for layer in self.layers})

    @property
    def stream(self) -> int:
        """Width of the residual stream, as `method.sequential` finds it."""
        return max(min(layer.shape) for layer in self.layers)

    @property
    def widest(self) -> int:
        """Width of the widest activation."""
        return max(max(layer.shape) for layer in self.layers)

    @property
    def table(self) -> int:
        """Entries of the embedding."""
        return prod(self.tables[0]) if self.tables else 0

    @property
    def largest(self) -> int:
        """Weights of the largest compressible layer."""
        return max(prod(layer.shape) for layer in self.layers)

    @property
    def group(self) -> int:
        """Weights of the largest group of layers that are worked on together, of equal inputs and one module."""
        together: Counter[tuple[int, str, int]] = Counter()
        for layer in self.layers:
            together[layer.block, layer.name.rpartition(".")[0], layer.shape[1]] += prod(layer.shape)
        return max(self.largest, *(weights for weights in together.values() if 4 * weights <= LARGE), 0)

    @property
    def inputs(self) -> int:
        """Σ in² over distinct inputs (`calibration.keep`)."""
        return squared_inputs(self.layers)

    @property
    def block_inputs(self) -> int:
        """The same of the block where it is largest."""
        blocks: dict[int, list[Layer]] = {}
        for layer in self.layers:
            blocks.setdefault(layer.block, []).append(layer)
        return max(map(squared_inputs, blocks.values()))


def read_shapes(model: str | Path) -> Shapes:
    """A checkpoint's shapes, from its `config.json`; its numbers are taken for 16 bits where there are no weights yet.

    Raises:
        HwpqError: the file is missing, or the model is not a causal LM.
    """
    built = meta_model(model)
    found: LayerMap = layer_map(model)
    parameters: dict[str, Any] = {name: tensor.numel() for name, tensor in built.named_parameters()}
    head = built.get_output_embeddings()
    return Shapes(
        layers=found.layers,
        others=sum(parameters.values()) - sum(layer.shape[0] * layer.shape[1] for layer in found),
        head=head.weight.numel() if head is not None else 0,
        tables=tuple(table.shape for table in found.tables),
        item=_item(model),
        side_bytes=sum(file.stat().st_size for file in Path(model).iterdir() if file.suffix != ".safetensors"),
    )


def _item(model: str | Path) -> int:
    try:
        return Checkpoint(model).torch_dtype.itemsize
    except HwpqError:
        return Shapes.item
