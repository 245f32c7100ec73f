"""One decoder block on its way from dense to compressed, and what a group's outputs lack there.

The tokens come in chunks of samples, so that a block's activations are bounded. `Notes` is what the dense block showed
of each chunk, `BlockState` what is known as its layers are compressed one group after the other, `Walk` what holds for
all blocks. `GroupSums` are the sums over all chunks that a group's compression needs: of its inputs, and of what its
outputs lack times the inputs that it gets now (`compression.correction`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.decoder.routes import Routes
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.sections import Sequence
from hwpq_pipeline.method.stream import Stream

#: Tokens of a product in bfloat16, which is rounded before it is added up.
BATCH = 4096

Step = Callable[[Group], Group]
#: A block's forward pass on one chunk of hidden states (samples, length, hidden).
Run = Callable[[Tensor], Tensor]


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


class Notes:
    """What the dense block showed of each chunk: its layers' inputs, outputs, and what the stream had lost before it.

    Args:
        spool: takes the tensors.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.places: dict[tuple[int, str, str], int] = {}

    def keep(self, chunk: int, kind: str, name: str, tensor: Tensor) -> None:
        """Note a tensor.

        Args:
            chunk: its number.
            kind: `input` or `output` of a layer, `normed` for that after a norm, `gap` of the stream, or `route`.
            name: of the layer.
            tensor: as it is.
        """
        self.places[chunk, kind, name] = len(self.spool)
        self.spool.append(tensor)

    def get(self, chunk: int, kind: str, name: str = "") -> Tensor | None:
        """The tensor; None if there is none."""
        place = self.places.get((chunk, kind, name))
        return None if place is None else self.spool[place]

    def routes(self, chunk: int) -> list[Tensor]:
        """What the routers chose, in order."""
        count = sum(1 for place in self.places if place[:2] == (chunk, "route"))
        return [self.of(chunk, "route", str(index)) for index in range(count)]

    def of(self, chunk: int, kind: str, name: str = "") -> Tensor:
        """The tensor, which is there."""
        return self.spool[self.places[chunk, kind, name]]


@dataclass
class BlockState:
    """One block on its way from dense to compressed.

    Attributes:
        block: the decoder block.
        weights: the parameters of the model, by name.
        layers: the block's.
        stacks: those that are compressed, by input group.
        kinds: of each stack: those of one kind do not feed one another.
        routes: which experts the dense block chooses.
        notes: what the dense block showed.
        tokens: of all chunks.
        stream: the layers that write to the residual stream.
        gap: what the stream lacks by now in the chunk that runs, (samples, length, hidden).
        done: groups that are compressed, by name.
    """

    block: nn.Module
    weights: Mapping[str, Tensor]
    layers: tuple[Layer, ...]
    stacks: dict[str, tuple[Layer, ...]]
    kinds: dict[str, str]
    routes: Routes
    notes: Notes
    tokens: int
    stream: Stream = field(default_factory=lambda: Stream({}, {}))
    gap: Tensor = field(default_factory=lambda: torch.empty(0))
    done: set[str] = field(default_factory=set)

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


def token_weights(state: BlockState, layers: tuple[Layer, ...], chunk: int, x: Tensor) -> Tensor | None:
    """How much each token counts, (…, 1), where the group is a writer that a norm follows; else None."""
    norm = state.stream.norms.get(layers[0].name) if len(layers) == 1 else None
    if norm is None:
        return None
    return norm.token_weights(state.notes.of(chunk, "output", layers[0].name)).view(*x.shape[:-1], 1)


class GroupSums:
    """The sums of one group over the chunks, each of which is added once.

    Args:
        walk: what holds for all blocks.
        state: the block's.
        layers: of the group.

    Attributes:
        gram: Σ x̃ x̃ᵀ.
        tokens: that reached it.
    """

    def __init__(self, walk: Walk, state: BlockState, layers: tuple[Layer, ...]) -> None:
        self.walk, self.state, self.layers = walk, state, layers
        self.gram = Gram(layers[0].shape[1], walk.device)
        self.tokens = 0
        self._lacking: dict[str, Tensor] = {}
        self._shift: Tensor | None = None

    def add(self, chunk: int, own: Tensor, x: Tensor) -> None:
        """Add a chunk's tokens.

        Args:
            chunk: its number.
            own: the dense model's inputs, (…, in_features).
            x: the compressed model's.
        """
        counts = token_weights(self.state, self.layers, chunk, x)
        rows = (x if counts is None else x * counts).flatten(0, -2).to(self.walk.dtype)
        for part in rows.split(BATCH):
            self.gram.add(part)
        self.tokens += len(rows)
        for layer in self.layers:
            if layer.name in self.state.stream.weights:
                lacking = self._outputs_lack(layer, chunk, own, x)
                pair = (lacking, x) if counts is None else (lacking * counts, x * counts)
                self._lacking[layer.name] = _added(self._lacking.get(layer.name), _sum(self.walk.dtype, *pair))
        if any(layer.name not in self.state.stream.weights for layer in self.layers):
            self._shift = _added(self._shift, _sum(self.walk.dtype, own.float() - x.float(), x))

    def _outputs_lack(self, layer: Layer, chunk: int, own: Tensor, x: Tensor) -> Tensor:
        """(…, out_features) what a writer's outputs lack."""
        weight, state = self.state.weight(layer), self.state
        noted = state.notes.of(chunk, "output", layer.name)
        output = noted.reshape(*x.shape[:-1], -1)
        with self.walk.products(low=True):
            given = nn.functional.linear(x, weight, _added_bias(state, layer, own, output)).float()
        wanted = state.stream.wanted(layer.name, state.gap, noted).reshape(given.shape)
        return output + wanted - given

    @property
    def seldom(self) -> bool:
        """Whether fewer tokens reached the group than there are, and than it has inputs."""
        return self.tokens < min(self.layers[0].shape[1], self.state.tokens)

    def shortfall(self) -> Tensor:
        """(rows, in_features) Σ (t − W₀x̃) x̃ᵀ of what the outputs lack.

        A writer's outputs are wanted themselves, so W₀x̃ is computed. For the others `t − W₀x̃ = W₀(x − x̃)`, and one
        product serves all rows: `W₀ Σ (x − x̃) x̃ᵀ`. The sums are let go: there is no second call.
        """
        found = torch.cat([self._of_layer(layer) for layer in self.layers])
        self._lacking, self._shift = {}, None
        return found

    def _of_layer(self, layer: Layer) -> Tensor:
        if self._shift is None or layer.name in self._lacking:
            return self._lacking[layer.name]
        return self.state.weight(layer) @ self._shift


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


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
