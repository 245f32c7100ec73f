"""The weights of the decoder blocks: what a compression could reach, counted on the dense checkpoint itself.

A block weight is a tensor with two or more dimensions inside one of the repeated decoder blocks, whatever module it
belongs to: matrices of linear layers, stacks of experts (3-D), routers, convolutions. Embeddings and head are outside
the blocks. Norms and biases are no block weights, also where they have two dimensions (a bias for each expert).

Names and shapes come from the files' headers. The layer map adds where the blocks are and which weights are
compressible. So what a compression cannot reach is counted too, and coverage (the compressed share) is honest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from hwpq_pipeline.checkpoints.layers import LayerMap
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.structure import NARROWEST

#: A norm's or a bias's name, as in `q_norm.weight`, `gate_up_proj_bias`.
_NO_WEIGHT = re.compile(r"bias$|norm[^.]*(\.weight)?$", re.IGNORECASE)


def block_weights(dense: Checkpoint, layers: LayerMap) -> dict[str, tuple[int, ...]]:
    """Shapes of the block weights by the tensor's name, in the order of the names.

    Args:
        dense: the dense checkpoint.
        layers: its compressible layers, which tell where the blocks are.
    """
    block = _block_pattern(layers)
    found = {}
    for name in dense.names:
        inside = block.match(name)
        if inside is None or int(inside[1]) >= layers.blocks or _NO_WEIGHT.search(name):
            continue
        if len(shape := dense.shape(name)) >= 2:
            found[name] = shape
    return found


def _block_pattern(layers: LayerMap) -> re.Pattern[str]:
    """Matches names of tensors inside a block, and gives its number. The files may call the blocks otherwise."""
    for layer in layers:
        name = layer.stored.tensor
        for found in re.finditer(rf"(?<=\.){layer.block}(?=\.)", name):
            start = name[: found.start()]
            if all(other.stored.tensor.startswith(f"{start}{other.block}.") for other in layers):
                return re.compile(rf"{re.escape(start)}(\d+)\.")
    return re.compile(rf"{re.escape(layers.blocks_name)}\.(\d+)\.")


def out_of_reach(dense: Checkpoint, layers: LayerMap) -> dict[str, tuple[int, ...]]:
    """The block weights that are no compressible layer's, as `block_weights` gives them."""
    known = {layer.stored.tensor for layer in layers}
    return {name: shape for name, shape in block_weights(dense, layers).items() if name not in known}


def told_left_dense(
    left: Mapping[str, tuple[int, ...]], everything: Mapping[str, tuple[int, ...]], layers: LayerMap
) -> list[str]:
    """What was left dense and why, a line for each kind of weight, the largest share first.

    Args:
        left: shapes of the weights that were left dense.
        everything: shapes of all block weights.
        layers: the compressible layers.

    Returns:
        Lines such as `model.layers.*.mlp.experts.gate_up_proj: 3-D tensor of experts, 59.3% of the block weights`.
    """
    known = {layer.stored.tensor for layer in layers}
    counts: dict[tuple[str, str], int] = {}
    for name, shape in left.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight")), _why(name, shape, known)
        counts[kind] = counts.get(kind, 0) + prod(shape)
    total = sum(map(prod, everything.values()))
    return [
        f"{' '.join(pattern.split())}: {why}, {count / total:.1%} of the block weights"  # one line, whatever the name
        for (pattern, why), count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _why(name: str, shape: tuple[int, ...], compressible: set[str]) -> str:
    if name in compressible:
        return "left as in the dense model"
    if len(shape) > 2:
        return f"{len(shape)}-D tensor" + (" of experts" if "expert" in name else "")
    if re.search(r"gate\.(w(eigh)?t|layer\.weight)$|router|shared_expert_gate", name):
        return "router of experts"
    if shape[-1] < NARROWEST:
        return "narrower than a group of columns"
    return "not a linear layer that can be compressed"
