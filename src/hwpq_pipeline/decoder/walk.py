"""A model's answers with one decoder block in memory.

The model's own forward pass on the first batch leads: when it comes to a block, the block is filled, and the other
batches go through it first, each with what `record_inputs` wrote down for it. So a block's weights are read once (the
first block's twice, since `record_inputs` runs it), and no more than one batch is at work.

What a block gets beside the hidden states must not depend on what the blocks before it computed. The first batch shows
whether it does: the inputs that it gets are compared with those that were written down for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import body_of
from hwpq_pipeline.decoder.blocks import (
    Forward,
    final_hidden,
    first_output,
    record_inputs,
    replaced_forwards,
    same_inputs,
    split_inputs,
)
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress


@torch.inference_mode()
def final_states(
    blockwise: BlockwiseModel,
    batches: Sequence[Tensor],
    *,
    progress: Progress = no_progress,
    milestones: Milestones | None = None,
) -> Iterator[Tensor]:
    """Final hidden states of each batch, shape (samples, length, hidden), float32, in order.

    Args:
        blockwise: the model.
        batches: token ids, each (samples, length).
        progress: called with (blocks done, blocks).
        milestones: where a walk that was killed left its states, and this one leaves its own; None for nowhere.

    Raises:
        HwpqError: a weight cannot be read, or blocks hand on more than hidden states.
    """
    model, blocks = blockwise.model, blockwise.blocks
    with blockwise.filled(0):
        hidden, extra = record_inputs(model, blocks, batches)
        begin = 0 if milestones is None else milestones.restore({"states": hidden})
        form = extra[0][0].run(blocks[0], hidden[0]) if begin else None  # what blocks that have run would give
    tails: dict[int, Any] = {}

    def led(number: int, real: Forward) -> Forward:
        def forward(*positional: Any, **keyword: Any) -> Any:
            state, inputs = split_inputs(positional, keyword)
            if number < begin:
                return (state, *form[1:]) if isinstance(form, tuple) else state
            if not same_inputs(inputs, extra[0][number]):
                raise HwpqError(
                    "what a block gets beside the hidden states depends on the blocks before it",
                    where=f"{blockwise.checkpoint.path}: {blockwise.blocks_name}.{number}",
                    remedy="This architecture cannot be run a block at a time; please report it.",
                )
            with blockwise.filled(number):
                for index in range(1, len(batches)):
                    output = extra[index][number].run(real, hidden[index])
                    hidden[index] = first_output(output)
                    tails[index] = output[1:] if isinstance(output, tuple) else None
                answer = inputs.run(real, hidden[0] if 0 < number == begin else state)
            hidden[0] = first_output(answer)
            if milestones is not None and number + 1 < len(blocks):
                milestones.pass_by(number + 1, {"states": hidden})
            progress(number + 1, len(blocks))
            return answer

        return forward

    with replaced_forwards(blocks, led):
        first: Tensor = body_of(model)(input_ids=batches[0], use_cache=False).last_hidden_state
    yield first.float()
    for index in range(1, len(batches)):
        state, tail = hidden[index], tails[index]
        yield final_hidden(model, blocks, batches[index], state if tail is None else (state, *tail)).float()
