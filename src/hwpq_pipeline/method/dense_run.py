"""The dense block's run, chunk by chunk: what its layers get and give is noted for the compressed block's runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.decoder.products import Products
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.method.blocks import BlockState, Run
from hwpq_pipeline.method.stream import Writers, find_stream


def run_dense(state: BlockState, runs: tuple[Run, ...], dense: Spool, compressed: Spool) -> None:
    """Take the dense model's hidden states through the block, and note what its layers get and give.

    Args:
        state: the block's.
        runs: its forward pass, by chunk.
        dense: hidden states (samples, length, hidden) by chunk, which are replaced.
        compressed: those of the compressed model before the block.
    """
    for chunk, run in enumerate(runs):
        before, writers = dense[chunk], Writers()
        state.notes.keep(chunk, "gap", "", before - compressed[chunk])
        dense[chunk] = after = _noted(state, chunk, run, before, writers)
        if chunk == 0:
            state.stream = find_stream(writers, before, after)
        for name in state.stream.weights:
            state.notes.keep(chunk, "output", name, writers.outputs[name])
        for name, norm in state.stream.norms.items():
            norm.meet(writers.outputs[name])
            state.notes.keep(chunk, "normed", name, writers.norms[name][1])


def _noted(state: BlockState, chunk: int, run: Run, hidden: Tensor, writers: Writers) -> Tensor:
    """The dense block's output for a chunk; inputs and routes are noted, and who may write."""
    leaders = {layers[0].name for layers in state.stacks.values()}
    inputs: dict[str, Tensor] = {}

    def keep(layers: tuple[Layer, ...], x: Tensor, output: Tensor) -> None:
        inputs.update({layer.name: x for layer in layers if layer.name in leaders})
        if len(layers) == 1 and output.shape[-1] == hidden.shape[-1] and output.numel() == hidden.numel():
            writers.outputs[layers[0].name] = output.reshape(hidden.shape)

    def follow(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(output, Tensor) and output.shape == hidden.shape:
            writers.follow(module, arguments[0], output)

    with ExitStack() as stack:
        for module in state.block.modules():
            stack.callback(module.register_forward_hook(follow).remove)
        stack.enter_context(Products(state.layers, state.weights, after=keep))
        stack.enter_context(state.routes.kept())
        after = run(hidden)
    for name, x in inputs.items():
        state.notes.keep(chunk, "input", name, x)
    for index, chosen in enumerate(state.routes.chosen):
        state.notes.keep(chunk, "route", str(index), chosen)
    return after
