"""Running a decoder one block at a time.

`record_inputs` finds what a block gets beside the hidden states: rotary angles, masks, cache flags. It runs the decoder
with recorders in the place of the blocks, so that sliding-window blocks and full ones each get their own. Inputs that
are the same for all batches are kept once. `lm_head` does not run. Of the blocks only the first runs, on the first
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def first_output(output: Any) -> torch.Tensor:
    """A block's hidden states: its output, or the first of a tuple."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def record_inputs(
    model: Any, blocks: nn.ModuleList, batches: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[Inputs]]]:
    """The first block's hidden states of each batch, and what else each block gets with each batch.

    A recorder replaces each block's `forward` and passes its input on, in the form (tensor or tuple) that the first
    block's real output has.

    Args:
        model: a causal LM.
        blocks: its decoder blocks.
        batches: token ids, each (samples, length).

    Returns:
        A tensor (samples, length, hidden) for each batch; and for each batch, for each block, the positional and
        keyword arguments after the hidden states.
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
