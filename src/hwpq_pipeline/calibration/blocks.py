"""One decoder block at a time: what goes into it, and the sums of what its linear layers are fed.

`record_inputs` finds what a block gets beside the hidden states (rotary angles, masks, cache flags): it runs
the decoder with the blocks replaced by recorders, so that sliding-window blocks and full ones each get their
own. It is kept once for all batches when it is the same. `lm_head` does not run, and of the blocks the first
alone, on the first batch.

`BlockSums` hooks the linear layers. Layers that are fed by the same tensor share one sum; which do is seen
from the memory that they read, not assumed from their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hwpq_pipeline.calibration.gram import Energy, Gram
from hwpq_pipeline.checkpoints.layers import LayerMap
from hwpq_pipeline.errors import HwpqError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class BlockSums:
    """The sums of one decoder block's inputs, filled by hooks on its linear layers.

    The first layer to meet a tensor leads its group and sums it; the others that meet the same memory before
    the batch ends join the group. Tensors are held until then, so that no address can be used twice.
    """

    def __init__(self, plan: LayerMap, number: int, kind: type[Gram] | type[Energy]) -> None:
        self.layers = {layer.name: layer.shape[1] for layer in plan.in_block(number)}
        self.prefix = f"{plan.blocks_name}.{number}."
        self.kind = kind
        self.sums: dict[str, Gram | Energy] = {}
        self.leader_of: dict[str, str] = {}
        self.seen: list[tuple[torch.Tensor, str]] = []
        self.seconds = 0.0

    @contextmanager
    def hooked(self, block: nn.Module) -> Iterator[None]:
        """Hooks on the block's linear layers while the context lasts."""
        handles = [
            block.get_submodule(name.removeprefix(self.prefix)).register_forward_pre_hook(self._hook(name))
            for name in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def meet(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x: torch.Tensor = arguments[0]
            leader = next((other for seen, other in self.seen if _same_memory(seen, x)), name)
            if self.leader_of.setdefault(name, leader) != leader:
                raise HwpqError(
                    f"it shares its input with {leader} in one batch and not in another",
                    where=name,
                    remedy="This architecture routes inputs by their values, which is not supported.",
                )
            if leader == name:
                self.seen.append((x, name))
                self._add(name, x)

        return meet

    def _add(self, name: str, x: torch.Tensor) -> None:
        now = time.perf_counter()
        if name not in self.sums:
            self.sums[name] = self.kind(self.layers[name], x.device)
        self.sums[name].add(x.reshape(-1, self.layers[name]))
        self.seconds += time.perf_counter() - now

    def end_batch(self) -> None:
        """Forget the batch's tensors."""
        self.seen.clear()

    def groups(self) -> list[tuple[str, list[str]]]:
        """Name and layers of each group, in module order; a layer that never ran is a group of its own."""
        members: dict[str, list[str]] = {}
        for name in self.layers:
            members.setdefault(self.leader_of.get(name, name), []).append(name)
        return [(layers[0], layers) for layers in members.values()]

    def tensors(self, groups: list[tuple[str, list[str]]], device: torch.device) -> dict[str, torch.Tensor]:
        """Each group's sum, on the CPU, by the group's name.

        Raises:
            HwpqError: an input was NaN or infinite.
        """
        found = {}
        for name, _ in groups:
            total = self.sums.get(self.leader_of.get(name, name)) or self.kind(self.layers[name], device)
            if not total.finite():
                raise HwpqError(
                    "inputs of this layer are NaN or infinite",
                    where=name,
                    remedy="Check the weights before it, or set calibration dtype to float32.",
                )
            found[name] = total.result()
        return found


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two live tensors are the same values in the same place, however they were reshaped."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.numel() == other.numel()
        and one.shape[-1] == other.shape[-1]
        and one.is_contiguous()
        and other.is_contiguous()
    )


def first_output(output: Any) -> torch.Tensor:
    """A block's hidden states: its output, or the first of a tuple."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def record_inputs(
    model: Any, blocks: nn.ModuleList, batches: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[Inputs]]]:
    """The first block's hidden states of each batch, and what else each block gets with each batch.

    The blocks' `forward` is replaced by a recorder that passes its input on, in the form (tensor or tuple)
    that the first block's real output has.
    """
    hidden: list[torch.Tensor] = []
    calls: list[Inputs] = []
    form: list[type] = []

    def recorder(index: int) -> Callable[..., Any]:
        real = blocks[index].forward

        def record(state: torch.Tensor, *positional: Any, **keyword: Any) -> Any:
            if index == 0:
                hidden.append(state)
                if not form:
                    form.append(type(real(state, *positional, **keyword)))
            calls.append((positional, keyword))
            return (state,) if form[0] is tuple else state

        return record

    extra: list[list[Inputs]] = []
    own = [block.__dict__.get("forward") for block in blocks]  # some wrappers hang theirs on the instance
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        for ids in batches:
            calls.clear()
            model.base_model(input_ids=ids, use_cache=False)
            extra.append(_shared(list(calls), extra))
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return hidden, extra


def _shared(calls: list[Inputs], earlier: list[list[Inputs]]) -> list[Inputs]:
    """An earlier batch's inputs when they are equal to these, so that equal masks are kept once."""
    for other in earlier:
        if _equal(calls, other):
            return other
    return calls


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one is other or one == other)
