"""One decoder block on its way from dense to compressed, and what a group's outputs lack there.

`Seen` is what the dense block showed, `BlockState` what is known as its layers are compressed one group after the
other, `Walk` what holds for all blocks. `shortfall` is the sum that the correction of a group's weights needs
(`compression.correction`): of what its outputs lack, times the inputs that it gets now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.decoder.routes import Routes
from hwpq_pipeline.method.groups import Group
from hwpq_pipeline.method.sections import Sequence
from hwpq_pipeline.method.stream import Stream, Writers

#: Tokens of a product in bfloat16, which is rounded before it is added up.
BATCH = 4096

Step = Callable[[Group], Group]


@dataclass(frozen=True)
class LiveSums:
    """The sums of one group's inputs as they are (an `InputSums`).

    Attributes:
        matrix: Σ x̃ x̃ᵀ, shape (in_features, in_features), float32.
        seldom: whether few tokens reached the group.
    """

    matrix: Tensor
    seldom: bool = False

    def gram(self) -> Tensor:
        """Σ x̃ x̃ᵀ."""
        return self.matrix

    def energy(self) -> Tensor:
        """Its diagonal."""
        return self.matrix.diagonal().clone()


@dataclass
class Seen:
    """What the layers of one block get and give in the dense model.

    Attributes:
        inputs: of every layer, by name, (…, in_features).
        writers: what may write to the residual stream.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    writers: Writers = field(default_factory=Writers)


@dataclass
class BlockState:
    """One block on its way from dense to compressed.

    Attributes:
        block: the decoder block.
        weights: the parameters of the model, by name.
        layers: the block's.
        stacks: those that are compressed, by input group.
        routes: which experts the dense block chooses.
        seen: what the layers get and give in the dense model.
        stream: the layers that write to the residual stream.
        gap: what the stream lacks by now, (samples, length, hidden).
        done: groups that are compressed, by name.
    """

    block: nn.Module
    weights: Mapping[str, Tensor]
    layers: tuple[Layer, ...]
    stacks: dict[str, tuple[Layer, ...]]
    routes: Routes
    seen: Seen
    stream: Stream
    gap: Tensor
    done: dict[str, Group] = field(default_factory=dict)

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight as it is now, (out, in), to read or to write."""
        return layer.place.of(self.weights[layer.place.tensor].data)

    def bias(self, layer: Layer) -> Tensor | None:
        """A layer's bias, where its product adds one."""
        return self.weights.get(layer.place.tensor.removesuffix("weight") + "bias")


@dataclass(frozen=True)
class Walk:
    """What holds for all blocks.

    Attributes:
        step: takes all steps of the recipe on a group.
        sequence: how the target is corrected.
        device: where the model runs.
        dtype: of products over tokens, float32 or bfloat16.
        stored: the dense checkpoint's dtype, which scales are rounded to.
    """

    step: Step
    sequence: Sequence
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype

    def products(self, *, low: bool) -> torch.autocast:
        """A context in which matrix products are in `dtype`, or in float32 if not ``low``.

        Nothing that was cast is kept: a weight is used before it is compressed, and after.
        """
        enabled = low and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def token_weights(state: BlockState, layers: tuple[Layer, ...], x: Tensor) -> Tensor | None:
    """How much each token counts, (…, 1), where the group is a writer that a norm follows; else None."""
    norm = state.stream.norms.get(layers[0].name) if len(layers) == 1 else None
    return None if norm is None else norm.token_weights().view(*x.shape[:-1], 1)


def shortfall(
    walk: Walk, state: BlockState, layers: tuple[Layer, ...], own: Tensor, x: Tensor, counts: Tensor | None
) -> Tensor:
    """(rows, in_features) Σ (t − W₀x̃) x̃ᵀ of what the outputs lack; `own` are the dense model's inputs.

    A writer's outputs are wanted themselves, so W₀x̃ is computed. For the others `t − W₀x̃ = W₀(x − x̃)`, and one
    product serves all rows: `W₀ Σ (x − x̃) x̃ᵀ`.
    """
    shift = None
    parts = []
    for layer in layers:
        weight = state.weight(layer)
        if layer.name in state.stream.weights:
            output = state.seen.writers.outputs[layer.name].reshape(*x.shape[:-1], -1)
            with walk.products(low=True):
                given = nn.functional.linear(x, weight, _added_bias(state, layer, own, output)).float()
            wanted = state.stream.wanted(layer.name, state.gap).reshape(given.shape)
            lacking = output + wanted - given
            parts.append(_sum(walk.dtype, *((lacking, x) if counts is None else (lacking * counts, x * counts))))
        else:
            shift = _sum(walk.dtype, own.float() - x.float(), x) if shift is None else shift
            parts.append(weight @ shift)
    return torch.cat(parts)


def _added_bias(state: BlockState, layer: Layer, own: Tensor, output: Tensor) -> Tensor | None:
    """The layer's bias if its product adds it, told by the first token of the dense model."""
    bias = state.bias(layer)
    if bias is None:
        return None
    plain = state.weight(layer) @ own.flatten(0, -2)[0].float()
    found = output.flatten(0, -2)[0].float()
    return bias if float((plain + bias - found).norm()) < float((plain - found).norm()) else None


def _sum(dtype: torch.dtype, lacking: Tensor, x: Tensor) -> Tensor:
    """(features of `lacking`, of `x`) Σ over tokens of their products, added up in float32."""
    pairs = zip(*(rows.flatten(0, -2).to(dtype).split(BATCH) for rows in (lacking, x)), strict=True)
    first, second = next(pairs)
    total = (first.T @ second).float()
    for first, second in pairs:
        total += first.T @ second
    return total
