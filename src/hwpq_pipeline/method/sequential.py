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

**Memory.** One block's weights are there at a time (`decoder.blockwise`). If its activations are few, all tokens run
through it at once, so that each of its layers runs only twice. Else the samples come in chunks: a run stops before the
next group, all chunks' sums are added up, and the runs begin again with the compressed group in place. That costs about
one more forward pass. What the dense block showed goes to files past a limit (`decoder.spool`).

**Precision.** Weights, hidden states and sums are float32. Products are in the dtype that the statistics were
collected in: bfloat16 makes the walk twice as fast where the processor multiplies it. Its rounding (2⁻⁹ of a value)
also enters what an output lacks, but it is uncorrelated with the inputs and averages out over the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.json_file import FETCH_AGAIN
from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.decoder.blocks import Inputs, first_output, record_inputs
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.decoder.products import Products
from hwpq_pipeline.decoder.routes import Routes
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.decoder.tokens import checked_ids
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.blocks import BlockState, GroupSums, LiveSums, Notes, Run, Step, Walk
from hwpq_pipeline.method.dense_run import run_dense
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.groups import Groups
from hwpq_pipeline.method.sections import Sequence

R = TypeVar("R")
#: Bytes of a block's activations up to which all tokens run at once, and of a chunk's above.
ALL_AT_ONCE, CHUNK = 2**30, 2**27


class _Stop(Exception):
    """All that the run was for is summed."""


@torch.inference_mode()
def walk_in_sequence(
    groups: Groups,
    token_ids: np.ndarray[Any, Any] | Tensor,
    step: Step,
    sequence: Sequence,
    *,
    finish: Callable[[Group], R],
    dtype: torch.dtype = torch.float32,
    milestones: Milestones | None = None,
    needed: int = 0,
) -> Iterator[R]:
    """A model's groups after ``step``, in module order, each on the outputs of the compressed ones before it.

    A group's `original` is the corrected target, and its errors are relative to that.

    Args:
        groups: of the dense model; of their statistics only which layers share an input is used.
        token_ids: (samples, length) the tokens to run.
        step: takes all steps of the recipe on a group.
        sequence: how the target is corrected.
        finish: what is kept of a group once its steps are taken.
        dtype: of products over tokens, float32 or bfloat16.
        milestones: where a walk that was killed left its states, and this one leaves its own; None for nowhere. A
            block's states are left once all its groups have been taken from this iterator.
        needed: the first block of which groups are wanted; those before it may be left out.

    Raises:
        HwpqError: a weight is damaged, a step cannot be taken, or the model routes tokens by their values.
    """
    walk = Walk(step, sequence, groups.device, dtype, groups.checkpoint.torch_dtype)
    path = groups.checkpoint.path
    blockwise = BlockwiseModel(path, torch.float32, remedy=FETCH_AGAIN, device=groups.device, head=False)
    chunks = _chunks(groups, checked_ids(token_ids, blockwise.model, str(path)).to(groups.device))
    dense = Spool()
    with blockwise.filled(0):
        _, extra = record_inputs(blockwise.model, blockwise.blocks, chunks, dense)
    blockwise.forget_embedding()
    compressed = Spool(dense)
    spools = {"dense": dense, "compressed": compressed}
    begin = milestones.restore(spools) if milestones is not None and milestones.block <= needed else 0
    for number in range(begin, len(blockwise.blocks)):
        kept: dict[str, R] = {}
        with blockwise.filled(number) as block:
            runs = tuple(partial(_forward, walk, block, inputs[number]) for inputs in extra)
            stacks = {name: layers for name, layers in groups.members().items() if layers[0].block == number}
            kinds = {name: _kind(groups.input_of(name)) for name in stacks}
            layers = groups.layers.in_block(number)
            notes = Notes(Spool() if len(runs) > 1 else Spool(in_memory=2 * ALL_AT_ONCE))
            tokens = sum(ids.numel() for ids in chunks)
            state = BlockState(block, blockwise.parameters(), layers, stacks, kinds, Routes(block), notes, tokens)
            run_dense(state, runs, dense, compressed)
            for group in run_compressed(walk, state, runs, compressed):
                kept[group.name] = finish(group)
        yield from kept.values()
        if milestones is not None and number + 1 < len(blockwise.blocks):
            milestones.pass_by(number + 1, spools)


def _chunks(groups: Groups, ids: Tensor) -> tuple[Tensor, ...]:
    """The tokens, all at once or in chunks of samples, by the bytes that a block's activations take."""
    widths = {_kind(groups.input_of(name)): layers[0].shape[1] for name, layers in groups.members().items()}
    stream = max(min(layer.shape) for layer in groups.layers)
    widest = max(max(layer.shape) for layer in groups.layers)
    sample = 4 * ids.shape[1] * (sum(widths.values()) + 4 * widest + 6 * stream)
    return (ids,) if len(ids) * sample <= ALL_AT_ONCE else ids.split(max(1, CHUNK // sample))


def _kind(name: str) -> str:
    """An input group's name without experts' numbers: they are of one kind."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _forward(walk: Walk, block: nn.Module, extra: Inputs, hidden: Tensor) -> Tensor:
    with walk.products(low=True):
        return first_output(extra.run(block, hidden))


def run_compressed(walk: Walk, state: BlockState, runs: tuple[Run, ...], hidden: Spool) -> Iterator[Group]:
    """Compress the block's groups, and take the compressed model's hidden states through it.

    Args:
        walk: what holds for all blocks.
        state: the block's, after `run_dense`.
        runs: its forward pass, by chunk.
        hidden: states (samples, length, hidden) by chunk, which are replaced.
    """
    if len(runs) == 1:
        done: list[Group] = []
        hidden[0] = _compressing(walk, state, runs[0], hidden[0], done)
        yield from done
    else:
        while sums := _next_sums(walk, state, runs, hidden):
            for name, summed in sums.items():
                yield _compress(walk, state, name, summed)
        for chunk, run in enumerate(runs):
            hidden[chunk] = _run(walk, state, chunk, run, hidden[chunk])
    for name in state.stacks.keys() - state.done:  # no token reached them
        yield _unreached(walk, state, name)


def _compressing(walk: Walk, state: BlockState, run: Run, hidden: Tensor, done: list[Group]) -> Tensor:
    """The block's output for the only chunk; each group is compressed right before it is used."""

    def meet(name: str, x: Tensor) -> None:
        sums = GroupSums(walk, state, state.stacks[name])
        _add(state, sums, 0, name, x)
        done.append(_compress(walk, state, name, sums))

    return _run(walk, state, 0, run, hidden, meet)


def _next_sums(walk: Walk, state: BlockState, runs: tuple[Run, ...], hidden: Spool) -> dict[str, GroupSums]:
    """The sums of the groups whose turn is next; those of one kind (experts) together. Nothing if none is left."""
    sums: dict[str, GroupSums] = {}
    left = [name for name in state.stacks if name not in state.done]

    def meet(added: set[str], chunk: int, name: str, x: Tensor) -> None:
        kind = state.kinds[name]
        if sums and kind != state.kinds[next(iter(sums))]:
            return
        if name not in sums:
            sums[name] = GroupSums(walk, state, state.stacks[name])
        _add(state, sums[name], chunk, name, x)
        added.add(name)
        if all(other in added for other in left if state.kinds[other] == kind):
            raise _Stop

    for chunk, run in enumerate(runs):
        with suppress(_Stop):
            _run(walk, state, chunk, run, hidden[chunk], partial(meet, set(), chunk))
    return sums


def _run(
    walk: Walk,
    state: BlockState,
    chunk: int,
    run: Run,
    hidden: Tensor,
    meet: Callable[[str, Tensor], None] = lambda *_: None,
) -> Tensor:
    """The block's output for a chunk of the compressed model.

    Args:
        walk, state: as for `run_compressed`.
        chunk: its number.
        run: the block's forward pass on it.
        hidden: its states (samples, length, hidden).
        meet: called with each group that is not compressed yet, and with its inputs, before its first layer runs.
    """
    group_of = {layer.name: name for name, layers in state.stacks.items() for layer in layers}
    stream, notes = state.stream, state.notes
    state.gap = notes.of(chunk, "gap")
    state.routes.chosen = notes.routes(chunk)
    met: set[str] = set()

    def before(layers: tuple[Layer, ...], x: Tensor) -> None:
        for name in dict.fromkeys(group_of[layer.name] for layer in layers if layer.name in group_of):
            if name not in state.done | met:
                met.add(name)
                with walk.products(low=False):  # in float32 whatever the forward pass is in
                    meet(name, x)

    def wrote(layers: tuple[Layer, ...], _: Tensor, output: Tensor) -> None:
        """After a layer has written to the stream: what is missing there now."""
        if (name := layers[0].name) in stream.weights and name not in stream.norms:
            _less(state, name, notes.of(chunk, "output", name), output.reshape(hidden.shape))

    def normed(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        """After the norm that follows a writer."""
        _less(state, name, notes.of(chunk, "normed", name), output)

    with ExitStack() as stack:
        for name, norm in stream.norms.items():
            stack.callback(norm.module.register_forward_hook(partial(normed, name)).remove)
        # The routes last: torch leaves both modes where it calls `meet`, so that no step's choice is taken for a route.
        stack.enter_context(Products(state.layers, state.weights, before=before, after=wrote))
        stack.enter_context(state.routes.replayed())
        return run(hidden)


def _less(state: BlockState, writer: str, wanted: Tensor, given: Tensor) -> None:
    state.gap = state.gap + state.stream.weights[writer] * (wanted.float() - given.float())


def _unreached(walk: Walk, state: BlockState, name: str) -> Group:
    """The group after the recipe's steps, without any inputs."""
    layers = state.stacks[name]
    original = torch.cat([state.weight(layer) for layer in layers])
    sums = LiveSums(original.new_zeros(original.shape[1], original.shape[1]))
    return walk.step(Group(name, layers, sums, walk.stored, original, original))


def _add(state: BlockState, sums: GroupSums, chunk: int, name: str, x: Tensor) -> None:
    own = state.notes.get(chunk, "input", state.stacks[name][0].name)
    if own is None or own.shape != x.shape:
        raise HwpqError(
            "it is fed by other tokens than in the dense model",
            where=name,
            remedy="Take preset admm, or set sequential to false: this architecture routes tokens by their values.",
        )
    sums.add(chunk, own, x)


def _compress(walk: Walk, state: BlockState, name: str, sums: GroupSums) -> Group:
    """The group after the recipe's steps, towards its corrected target; the model gets its weights."""
    layers = state.stacks[name]
    gram = sums.gram.result().to(walk.device)
    target = torch.cat([state.weight(layer) for layer in layers])
    if not sums.seldom:
        target = corrected_target(
            target, gram, sums.shortfall(), steps=walk.sequence.steps, damping=walk.sequence.damping, where=name
        )
    group = walk.step(Group(name, layers, LiveSums(gram, sums.seldom), walk.stored, target, target))
    for layer, part in group.rows:
        state.weight(layer).copy_(group.weight[part])
    state.done.add(name)
    return group
