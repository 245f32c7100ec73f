"""Every token through every expert, so that each expert's sums are of all tokens.

A router sends an expert a few tokens in a hundred, and one that is seldom chosen has sums of too few to say anything.
Here a block runs as it is, and what its experts get is run once more through all of them, for the sums alone: the
block's output is that of the routed tokens. The price: the sums are of tokens that the expert would not get in use, and
the experts cost as many times more as there are experts for each one that is chosen. They get a slice of the tokens at
a time, so that memory holds no more than that.

It is done where experts are a module that is given the tokens, and for each the experts that were chosen
(`forward(hidden_states, top_k_index, top_k_weights)`, transformers' common form).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.calibration.blocks import BlockSums
from hwpq_pipeline.checkpoints.structure import experts_of
from hwpq_pipeline.errors import HwpqError

_FORM = ["hidden_states", "top_k_index", "top_k_weights"]
#: Tokens that go through all experts at a time.
_SLICE = 1024


@contextmanager
def all_experts(block: nn.Module, sums: BlockSums, where: str) -> Iterator[None]:
    """While the context lasts, the block's experts show all tokens in place of the routed ones.

    Args:
        block: a decoder block; without experts nothing changes.
        sums: of the block; the routed run is not summed.
        where: the block, for errors.

    Raises:
        HwpqError: the block has experts of another form.
    """
    stacks = [module for module in block.modules() if _takes_choices(module)]
    if not stacks and any(experts_of(module) > 1 for module in block.modules()):
        raise HwpqError(
            "its experts are not given the choices of a router, so all tokens cannot be sent to them",
            where=where,
            remedy="Set calibration.all_experts to false.",
        )
    with ExitStack() as stack:
        for module in stacks:
            real = module.forward
            module.forward = partial(_both, module, real, sums)
            stack.callback(_put_back, module, real)
        yield


def _takes_choices(module: nn.Module) -> bool:
    return experts_of(module) > 1 and list(inspect.signature(module.forward).parameters) == _FORM


def _both(module: Any, real: Any, sums: BlockSums, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    routed = sums.unseen(lambda: real(hidden_states, index, weights))
    count = experts_of(module)
    for part in hidden_states.split(_SLICE):
        everyone = torch.arange(count, device=index.device).expand(len(part), count)
        real(part, everyone, weights.new_full(everyone.shape, 1 / count))
        sums.end_batch()
    return routed


def _put_back(module: nn.Module, real: Any) -> None:
    if "forward" in module.__dict__:
        del module.forward
    if module.forward != real:  # a wrapper's own
        module.forward = real
