"""Running a decoder one block at a time.

`record_inputs` finds what a block gets beside the hidden states: rotary angles, masks, cache flags. It runs the decoder
with recorders in the place of the blocks, so that sliding-window blocks and full ones each get their own. Inputs that
are the same for all batches are kept once. `lm_head` does not run. Of the blocks only the first runs, on the first
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from hwpq_pipeline.checkpoints.layers import body_of, text_model
from hwpq_pipeline.decoder.spool import Spool

Forward = Callable[..., Any]


class Inputs(NamedTuple):
    """What a block gets beside the hidden states, to be replayed as it was.

    Attributes:
        positional: arguments after the hidden states, or all where those are given by name.
        keyword: by name.
        name: of the hidden states' argument; None where they come first.
    """

    positional: tuple[Any, ...]
    keyword: dict[str, Any]
    name: str | None

    def run(self, block: Forward, state: torch.Tensor) -> Any:
        """The block's output on other hidden states."""
        if self.name is None:
            return block(state, *self.positional, **self.keyword)
        return block(*self.positional, **self.keyword, **{self.name: state})


def split_inputs(positional: tuple[Any, ...], keyword: dict[str, Any]) -> tuple[torch.Tensor, Inputs]:
    """A block's hidden states (its first argument, or the one of that name), and the rest."""
    if positional:
        return positional[0], Inputs(positional[1:], keyword, None)
    name = "hidden_states" if "hidden_states" in keyword else next(iter(keyword))
    return keyword[name], Inputs((), {other: value for other, value in keyword.items() if other != name}, name)


def first_output(output: Any) -> torch.Tensor:
    """A block's hidden states: its output, or the first of a tuple."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def record_inputs(
    model: Any, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], hidden: Spool | None = None
) -> tuple[Spool, list[list[Inputs]]]:
    """The first block's hidden states of each batch, and what else each block gets with each batch.

    A recorder replaces each block's `forward` and passes its input on, in the form (tensor or tuple) that the first
    block's real output has. What else is in a tuple is that block's.

    Args:
        model: a causal LM.
        blocks: its decoder blocks.
        batches: token ids, each (samples, length).
        hidden: takes the hidden states; a new one by default.

    Returns:
        A tensor (samples, length, hidden) for each batch; and for each batch, for each block, what it gets beside
        the hidden states.
    """
    hidden = Spool() if hidden is None else hidden
    calls: list[Inputs] = []
    form: list[Any] = []

    def recorder(index: int, real: Forward) -> Forward:
        def record(*positional: Any, **keyword: Any) -> Any:
            state, inputs = split_inputs(positional, keyword)
            if index == 0:
                hidden.append(state)
                if not form:
                    form.append(inputs.run(real, state))
            calls.append(inputs)
            return (state, *form[0][1:]) if isinstance(form[0], tuple) else state

        return record

    extra: list[list[Inputs]] = []
    with replaced_forwards(blocks, recorder):
        for ids in batches:
            calls.clear()
            text_model(model)(input_ids=ids, use_cache=False)
            extra.append(_shared(list(calls), extra))
    return hidden, extra


def final_hidden(model: Any, blocks: nn.ModuleList, ids: torch.Tensor, output: Any) -> torch.Tensor:
    """What the model's body makes of the last block's output, for example by its last norm.

    Args:
        model: a causal LM.
        blocks: its decoder blocks, of which none runs.
        ids: the token ids, (samples, length).
        output: of the last block, a tensor or a tuple.
    """
    with replaced_forwards(blocks, lambda *_: lambda *_, **__: output):
        found: torch.Tensor = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return found


@contextmanager
def replaced_forwards(blocks: nn.ModuleList, replacement: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Other forward passes in the place of the blocks' own, while the context lasts.

    Args:
        blocks: the decoder blocks.
        replacement: gets a block's number and its forward pass, and gives the other one.
    """
    own = [block.__dict__.get("forward") for block in blocks]  # some wrappers hang theirs on the instance
    try:
        for number, block in enumerate(blocks):
            block.forward = replacement(number, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _shared(calls: list[Inputs], earlier: list[list[Inputs]]) -> list[Inputs]:
    """An earlier batch's inputs when they are equal to these, so that equal masks are kept once."""
    for other in earlier:
        if same_inputs(calls, other):
            return other
    return calls


def same_inputs(one: Any, other: Any) -> bool:
    """Whether two blocks' inputs, or parts of them, are equal to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_inputs, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_inputs(one[key], other[key]) for key in one)
    return bool(one is other or one == other)
