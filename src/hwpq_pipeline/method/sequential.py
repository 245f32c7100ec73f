"""Compressing a model's layers in order, each on what the compressed layers before it give.

Every block runs twice. Run as it came on the dense model's hidden states, it tells what every layer should give. Run
on the hidden states of the compressed model, it stops before each group of layers. The group's inputs are summed
there (`X̃X̃ᵀ` and `(T − W₀X̃)X̃ᵀ`), the dense weight is replaced by the corrected target (`compression.correction`),
the recipe's steps are taken, and the run goes on with what they made. So a variant costs two forward passes and the
sums. Products are watched by the weights that they read (`decoder.products`), so it does not matter what modules make
them; experts see the tokens that the dense model routes to them (`decoder.routes`).

**The residual stream.** A layer whose output is added to the stream is also asked for what the stream has lost by
then, through a norm if one is between them (`method.stream`). If no layers are found whose outputs make up the stream's
change, all are asked for the dense outputs alone. So are experts.

**Memory.** All tokens run through a block at once, so that each of its layers runs only twice. Memory holds two hidden
states and the activations of two runs of one block, in float32. If that is too much, take fewer samples.

**Precision.** Weights, hidden states and sums are float32. Products are in the dtype that the statistics were
collected in: bfloat16 makes the walk twice as fast where the processor multiplies it. Its rounding (2⁻⁹ of a value)
also enters what an output lacks, but it is uncorrelated with the inputs and averages out over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer, find_blocks
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.decoder.blocks import Inputs, first_output, record_inputs
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.decoder.products import Products
from hwpq_pipeline.decoder.routes import Routes
from hwpq_pipeline.decoder.tokens import checked_ids
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.blocks import BATCH, BlockState, LiveSums, Seen, Step, Walk, shortfall, token_weights
from hwpq_pipeline.method.groups import Group, Groups
from hwpq_pipeline.method.sections import Sequence
from hwpq_pipeline.method.stream import Stream, find_stream


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
    model = load_dense(groups.checkpoint.path, torch.float32, groups.device)
    ids = checked_ids(token_ids, model, str(groups.checkpoint.path)).to(groups.device)
    _, blocks = find_blocks(model)
    (dense,), (extra,) = record_inputs(model, blocks, [ids])
    compressed = dense
    weights = dict(model.named_parameters(remove_duplicate=False))
    for number, block in enumerate(blocks):
        forward = partial(_forward, walk, block, extra[number])
        stacks = {name: layers for name, layers in groups.members().items() if layers[0].block == number}
        layers = groups.layers.in_block(number)
        state = BlockState(block, weights, layers, stacks, Routes(block), Seen(), Stream({}, {}), dense - compressed)
        following = run_dense(state, forward, dense)
        state.stream = find_stream(state.seen.writers, dense, following)
        dense, compressed = following, run_compressed(walk, state, forward, compressed)
        yield from state.done.values()
        block.to("meta")  # it has done its work


def _forward(walk: Walk, block: nn.Module, extra: Inputs, hidden: Tensor) -> Tensor:
    with walk.products(low=True):
        return first_output(extra.run(block, hidden))


def run_dense(state: BlockState, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The dense block's hidden states (samples, length, hidden); the state notes what its layers get and give."""
    seen = state.seen

    def keep(layers: tuple[Layer, ...], x: Tensor, output: Tensor) -> None:
        for layer in layers:
            seen.inputs[layer.name] = x
        if len(layers) == 1 and output.shape[-1] == hidden.shape[-1] and output.numel() == hidden.numel():
            seen.writers.outputs[layers[0].name] = output.reshape(hidden.shape)

    def follow(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(output, Tensor) and output.shape == hidden.shape:
            seen.writers.follow(module, arguments[0], output)

    with ExitStack() as stack:
        for module in state.block.modules():
            stack.callback(module.register_forward_hook(follow).remove)
        stack.enter_context(Products(state.layers, state.weights, after=keep))
        stack.enter_context(state.routes.kept())
        return forward(hidden)


def run_compressed(walk: Walk, state: BlockState, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The block's hidden states (samples, length, hidden) once its layers are compressed, which happens on the way."""
    group_of = {layer.name: name for name, layers in state.stacks.items() for layer in layers}
    stream, outputs = state.stream, state.seen.writers.outputs

    def meet(layers: tuple[Layer, ...], x: Tensor) -> None:
        """Before the first layer of a group runs: compress the group, in float32 whatever the forward pass is in."""
        for name in dict.fromkeys(group_of[layer.name] for layer in layers if layer.name in group_of):
            if name not in state.done:
                with walk.products(low=False):
                    state.done[name] = _compress(walk, state, name, x)

    def wrote(layers: tuple[Layer, ...], _: Tensor, output: Tensor) -> None:
        """After a layer has written to the stream: what is missing there now."""
        if (name := layers[0].name) in stream.weights and name not in stream.norms:
            _less(state, name, outputs[name], output.reshape(hidden.shape))

    def normed(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        """After the norm that follows a writer."""
        _less(state, name, stream.norms[name].output, output)

    with ExitStack() as stack:
        for name, norm in stream.norms.items():
            stack.callback(norm.module.register_forward_hook(partial(normed, name)).remove)
        # The routes last: torch leaves both modes where it calls `meet`, so that no step's choice is taken for a route.
        stack.enter_context(Products(state.layers, state.weights, before=meet, after=wrote))
        stack.enter_context(state.routes.replayed())
        after = forward(hidden)
    for name in state.stacks.keys() - state.done.keys():  # no token reached them
        state.done[name] = _unreached(walk, state, name)
    return after


def _less(state: BlockState, writer: str, wanted: Tensor, given: Tensor) -> None:
    state.gap = state.gap + state.stream.weights[writer] * (wanted.float() - given.float())


def _unreached(walk: Walk, state: BlockState, name: str) -> Group:
    """The group after the recipe's steps, without any inputs."""
    layers = state.stacks[name]
    original = torch.cat([state.weight(layer) for layer in layers])
    sums = LiveSums(original.new_zeros(original.shape[1], original.shape[1]))
    return walk.step(Group(name, layers, sums, walk.stored, original, original))


def _compress(walk: Walk, state: BlockState, name: str, x: Tensor) -> Group:
    """The group after the recipe's steps, towards its corrected target; the model gets its weights."""
    layers = state.stacks[name]
    own = state.seen.inputs.get(layers[0].name)
    if own is None or own.shape != x.shape:
        raise HwpqError(
            "it is fed by other tokens than in the dense model",
            where=name,
            remedy="Take preset admm, or set sequential to false: this architecture routes tokens by their values.",
        )
    original = torch.cat([state.weight(layer) for layer in layers])
    counts = token_weights(state, layers, x)
    rows = (x if counts is None else x * counts).flatten(0, -2).to(walk.dtype)
    sums = Gram(rows.shape[-1], rows.device)
    for part in rows.split(BATCH):
        sums.add(part)
    gram = sums.result().to(rows.device)
    seldom = len(rows) < min(rows.shape[1], state.gap.shape[:-1].numel())
    target = original
    if not seldom:
        missing = shortfall(walk, state, layers, own, x, counts)
        target = corrected_target(
            original, gram, missing, steps=walk.sequence.steps, damping=walk.sequence.damping, where=name
        )
    group = walk.step(Group(name, layers, LiveSums(gram, seldom), walk.stored, target, target))
    for layer, part in group.rows:
        state.weight(layer).copy_(group.weight[part])
    return group
