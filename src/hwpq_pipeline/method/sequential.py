"""Compressing a model's layers in order, each on what the compressed layers before it give.

Every block runs twice. Run as it came on the dense model's hidden states, it tells what every layer should give. Run
on the hidden states of the compressed model, it stops before each group of layers. The group's inputs are summed
there (`X̃X̃ᵀ` and `(T − W₀X̃)X̃ᵀ`), the dense weight is replaced by the corrected target (`compression.correction`),
the recipe's steps are taken, and the run goes on with what they made. So a variant costs two forward passes and the
sums.

**The residual stream.** A layer whose output is added to the stream is also asked for what the stream has lost by
then. These layers (writers) are measured, not taken from names: the outputs of the layers that are as wide as the
stream are fitted to its change over the dense block. If a weighted sum of them is the change, the layers with a weight
are the writers. If not (a norm follows the layer, say), there are none, and all are asked for the dense outputs alone.

**Memory.** All tokens run through a block at once, so that each of its layers runs only twice. Memory holds two hidden
states and the activations of two runs of one block, in float32. If that is too much, take fewer samples.

**Precision.** Weights, hidden states and sums are float32. Products are in the dtype that the statistics were
collected in: bfloat16 makes the walk twice as fast where the processor multiplies it. Its rounding (2⁻⁹ of a value)
also enters what an output lacks, but it is uncorrelated with the inputs and averages out over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, find_blocks
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.decoder.blocks import first_output, record_inputs
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.decoder.tokens import checked_ids
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.groups import Group, Groups
from hwpq_pipeline.method.recipe import Sequence

#: Tokens on which the writers of the residual stream are found, and how exactly their sum must be its change.
PROBE, FIT = 512, 1e-3
#: Tokens of a product in bfloat16, which is rounded before it is added up.
BATCH = 4096

Step = Callable[[Group], Group]
Member = tuple[Layer, nn.Linear]


@dataclass(frozen=True)
class LiveSums:
    """The sums of one group's inputs as they are, shape (in_features, in_features), float32 (an `InputSums`)."""

    matrix: Tensor

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
        inputs: of every layer, by name, (samples, length, in_features).
        outputs: of the layers that are as wide as the residual stream, by name, (samples, length, hidden).
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class BlockState:
    """One block on its way from dense to compressed.

    Attributes:
        seen: what its layers get and give in the dense model.
        stream: layers that write to the residual stream, and each one's weight in it.
        gap: what the stream lacks by now, (samples, length, hidden).
        stacks: the block's layers by input group.
        done: groups that are compressed, by name.
    """

    seen: Seen
    stream: dict[str, float]
    gap: Tensor
    stacks: dict[str, list[Member]]
    done: dict[str, Group] = field(default_factory=dict)


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


@torch.inference_mode()
def walk_in_sequence(
    groups: Groups,
    token_ids: np.ndarray[Any, Any] | Tensor,
    step: Step,
    sequence: Sequence,
    *,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Group]:
    """A model's groups after ``step``, in module order, each on the outputs of the compressed ones before it.

    A group's `original` is the corrected target, and its errors are relative to that.

    Args:
        groups: of the dense model; of their statistics only which layers share an input is used.
        token_ids: (samples, length) the tokens to run.
        step: takes all steps of the recipe on a group.
        sequence: how the target is corrected.
        dtype: of products over tokens, float32 or bfloat16.

    Raises:
        HwpqError: a weight is damaged, a step cannot be taken, or the model routes tokens by their values.
    """
    walk = Walk(step, sequence, groups.device, dtype, groups.checkpoint.torch_dtype)
    group_of = {layer.name: name for name, layers in groups.members().items() for layer in layers}
    model = load_dense(groups.checkpoint.path, torch.float32, groups.device)
    ids = checked_ids(token_ids, model, str(groups.checkpoint.path)).to(groups.device)
    _, blocks = find_blocks(model)
    (dense,), (extra,) = record_inputs(model, blocks, [ids])
    compressed = dense
    for number, block in enumerate(blocks):
        forward = partial(_forward, walk, block, extra[number])
        members = _members(block, groups.layers, number)
        seen, following = run_dense(members, forward, dense)
        stacks: dict[str, list[Member]] = {}
        for layer, module in members:
            stacks.setdefault(group_of[layer.name], []).append((layer, module))
        state = BlockState(seen, stream_weights(seen, dense, following), dense - compressed, stacks)
        dense, compressed = following, run_compressed(walk, state, forward, compressed)
        yield from state.done.values()
        block.to("meta")  # it has done its work


def _forward(walk: Walk, block: nn.Module, extra: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor) -> Tensor:
    positional, keyword = extra
    with walk.products(low=True):
        return first_output(block(hidden, *positional, **keyword))


def _members(block: nn.Module, layers: LayerMap, number: int) -> list[Member]:
    """The block's compressible layers and their modules."""
    prefix = f"{layers.blocks_name}.{number}."
    return [
        (layer, cast(nn.Linear, block.get_submodule(layer.name.removeprefix(prefix))))
        for layer in layers.in_block(number)
    ]


def run_dense(members: list[Member], forward: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Seen, Tensor]:
    """What the layers get and give, and the block's hidden states (samples, length, hidden), in the dense model."""
    seen = Seen()

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs[name] = arguments[0]
        if output.shape == hidden.shape:
            seen.outputs[name] = output

    with ExitStack() as stack:
        for layer, module in members:
            stack.callback(module.register_forward_hook(partial(keep, layer.name)).remove)
        return seen, forward(hidden)


def stream_weights(seen: Seen, before: Tensor, after: Tensor) -> dict[str, float]:
    """Layers whose outputs make up the change of the residual stream, and each one's weight in it.

    Args:
        seen: the layers' outputs in the dense block.
        before, after: the stream (samples, length, hidden) on both sides of the block.
    """
    if not seen.outputs:
        return {}
    change = _probe(after - before)
    columns = torch.stack([_probe(output) for output in seen.outputs.values()], dim=1)
    weights = torch.linalg.lstsq(columns, change[:, None]).solution[:, 0]
    missed = float((change - columns @ weights).norm() / change.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if missed > FIT:
        return {}
    return {name: float(weight) for name, weight in zip(seen.outputs, weights, strict=True) if abs(weight) > FIT}


def _probe(hidden: Tensor) -> Tensor:
    """(values,) of the first tokens, float64 on the CPU."""
    return hidden.flatten(0, -2)[:PROBE].flatten().double().cpu()


def run_compressed(walk: Walk, state: BlockState, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The block's hidden states (samples, length, hidden) once its layers are compressed, which happens on the way."""

    def meet(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the first layer of a group runs: compress the group, in float32 whatever the forward pass is in."""
        if name not in state.done:
            with walk.products(low=False):
                state.done[name] = _compress(walk, state, name, arguments[0])

    def wrote(name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """After a layer has written to the stream: what is missing there now."""
        state.gap = state.gap + state.stream[name] * (state.seen.outputs[name].float() - output.float())

    with ExitStack() as stack:
        for name, members in state.stacks.items():
            for layer, module in members:
                stack.callback(module.register_forward_pre_hook(partial(meet, name)).remove)
                if layer.name in state.stream:
                    stack.callback(module.register_forward_hook(partial(wrote, layer.name)).remove)
        return forward(hidden)


def _compress(walk: Walk, state: BlockState, name: str, x: Tensor) -> Group:
    """The group after the recipe's steps, towards its corrected target; the block's modules get its weights."""
    members = state.stacks[name]
    own = state.seen.inputs.get(members[0][0].name)
    if own is None or own.shape != x.shape:
        raise HwpqError(
            "it is fed by other tokens than in the dense model",
            where=name,
            remedy="Take preset admm, or set sequential to false: this architecture routes tokens by their values.",
        )
    original = torch.cat([module.weight for _, module in members])
    rows = x.flatten(0, -2).to(walk.dtype)
    sums = Gram(rows.shape[-1], rows.device)
    for part in rows.split(BATCH):
        sums.add(part)
    gram = sums.result().to(rows.device)
    missing = _missing(walk, state, members, original, own, x)
    target = corrected_target(
        original, gram, missing, steps=walk.sequence.steps, damping=walk.sequence.damping, where=name
    )
    layers = tuple(layer for layer, _ in members)
    group = walk.step(Group(name, layers, LiveSums(gram), walk.stored, target, target))
    modules = dict(members)
    for layer, part in group.rows:
        modules[layer].weight.copy_(group.weight[part])
    return group


def _missing(walk: Walk, state: BlockState, members: list[Member], original: Tensor, own: Tensor, x: Tensor) -> Tensor:
    """(rows, in_features) Σ (t − W₀x̃) x̃ᵀ of what the outputs lack; `own` are the dense model's inputs.

    A writer's outputs are wanted themselves, so W₀x̃ is computed. For the others `t − W₀x̃ = W₀(x − x̃)`, and one
    product serves all rows: `W₀ Σ (x − x̃) x̃ᵀ`.
    """
    shift = None
    parts = []
    for (layer, module), part in zip(members, original.split([layer.shape[0] for layer, _ in members]), strict=True):
        if layer.name in state.stream:
            with walk.products(low=True):
                given = nn.functional.linear(x, module.weight, module.bias).float()
            lacking = state.seen.outputs[layer.name] + state.gap / state.stream[layer.name] - given
            parts.append(_sum(walk.dtype, lacking, x))
        else:
            shift = _sum(walk.dtype, own.float() - x.float(), x) if shift is None else shift
            parts.append(part @ shift)
    return torch.cat(parts)


def _sum(dtype: torch.dtype, lacking: Tensor, x: Tensor) -> Tensor:
    """(features of `lacking`, of `x`) Σ over tokens of their products, added up in float32."""
    pairs = zip(*(rows.flatten(0, -2).to(dtype).split(BATCH) for rows in (lacking, x)), strict=True)
    first, second = next(pairs)
    total = (first.T @ second).float()
    for first, second in pairs:
        total += first.T @ second
    return total
