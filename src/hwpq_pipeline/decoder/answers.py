"""A causal LM that is asked for its next-token distributions, with gradients if they are wanted.

The body gives final hidden states for all tokens at once. The head turns them into logits a piece of the tokens at a
time (`head`), since logits over a large vocabulary take far more memory than all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import body_of
from hwpq_pipeline.decoder.dtypes import has_bfloat16
from hwpq_pipeline.decoder.head import Head, find_head

_PROBE = 8


@dataclass(frozen=True)
class Answers:
    """A model to be asked.

    Attributes:
        model: the causal LM.
        head: from its final hidden states to logits.
    """

    model: Any
    head: Head

    @classmethod
    def of(cls, model: Any, where: str) -> Self:
        """A model's, whose head is found by a few tokens.

        Raises:
            HwpqError: it has no head, or one whose logits do not come from its final hidden states.
        """
        table = model.get_input_embeddings().weight
        ids = torch.arange(_PROBE, device=table.device)[None] % len(table)
        with torch.no_grad():  # not inference mode: a model may keep a table that it makes here
            hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state.float()
            logits = model(input_ids=ids, use_cache=False).logits.float()
        return cls(model, find_head(model, hidden, logits, where))

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states (samples, length, hidden), float32; products in bfloat16 where the machine has it."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=has_bfloat16(ids.device), cache_enabled=False):
            found: Tensor = body_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        return found.float()
