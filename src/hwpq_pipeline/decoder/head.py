"""The head of a causal LM: from final hidden states `h` to logits `z`, over and over, without running the body again.

Most heads are linear, `z = s (W h + b)`, with a scale `s` that is 1 for all but a few (Cohere, Granite). Some cap their
logits, `z = c · tanh(W h / c)` (Gemma 2): such a head is *curved*, and its logits are computed by the model's own
forward pass, with a body that answers with the given hidden states. So nothing is rebuilt here. Which kind a head is,
is measured on a few tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import body_of, text_model
from hwpq_pipeline.errors import HwpqError

_REMEDY = "Use a causal LM whose logits come from its body's last hidden states."


@dataclass(frozen=True)
class Head:
    """The head of a causal LM.

    Attributes:
        model: the causal LM.
        weight: (vocabulary, hidden), float32.
        bias: (vocabulary,), float32, or None.
        scale: of the logits.
        linear: whether logits are `scale · (weight · h + bias)`.
    """

    model: nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    linear: bool = True

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (…, hidden), shape (…, vocabulary), float32."""
        if self.linear:
            plain = nn.functional.linear(hidden, self.weight, self.bias)
            return plain if self.scale == 1 else plain * self.scale
        return answered_logits(self.model, hidden)

    def digest(self) -> str:
        """Hex SHA-256 of the head's values: two models with the same one have the same head."""
        digest = hashlib.sha256(self.weight.contiguous().numpy().data)
        if self.bias is not None:
            digest.update(self.bias.contiguous().numpy().data)
        return digest.hexdigest()


def plain_head(model: Any, where: str) -> Head:
    """A model's head as if its logits were `W h + b`.

    Args:
        model: the causal LM.
        where: the model, for errors.

    Raises:
        HwpqError: it has no head.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise HwpqError("no language model head", where=where, remedy="Use a causal LM.")
    bias = getattr(layer, "bias", None)
    return Head(model, layer.weight.detach().float(), None if bias is None else bias.detach().float())


def answered_logits(model: Any, hidden: Tensor) -> Tensor:
    """What the model's own forward pass makes of final hidden states (…, hidden): (…, vocabulary), float32."""
    flat = hidden.reshape(1, -1, hidden.shape[-1]).to(model.get_output_embeddings().weight.dtype)
    with _body_answers(model, flat):
        ids = torch.zeros(flat.shape[:2], dtype=torch.int64, device=flat.device)
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float().view(*hidden.shape[:-1], -1)


def find_head(model: Any, hidden: Tensor, logits: Tensor, where: str) -> Head:
    """A model's head, measured.

    Args:
        model: the causal LM.
        hidden: final hidden states of some tokens, float32.
        logits: the model's logits of them, float32.
        where: the model, for errors.

    Raises:
        HwpqError: it has no head, or its logits do not come from these hidden states.
    """
    plain = plain_head(model, where)
    # bfloat16 models round their logits to 8 bits of mantissa; ours stay in float32.
    tolerance = 1e-4 if model.get_output_embeddings().weight.dtype == torch.float32 else 2e-2
    allowed = tolerance * float(logits.abs().max() + 1)

    def agrees(head: Head) -> bool:
        found = head.logits(hidden)
        return found.shape == logits.shape and float((found - logits).abs().max()) <= allowed

    if agrees(plain):
        return plain
    ours = plain.logits(hidden)
    if ours.shape == logits.shape:
        scaled = replace(plain, scale=float((ours * logits).sum() / ours.square().sum()))
        if agrees(scaled):
            return scaled
    curved = replace(plain, linear=False)
    if agrees(curved):
        return curved
    raise HwpqError("its logits do not come from its last hidden states", where=where, remedy=_REMEDY)


@contextmanager
def _body_answers(model: Any, hidden: Tensor) -> Iterator[None]:
    """The model's body gives these hidden states, whatever it is asked, while the context lasts."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Answer(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Nothing in the place of what only some bodies give: caches of states, routers' logits."""
            if name.startswith("_"):
                raise AttributeError(name)

    bodies = {body_of(model), text_model(model)}  # OPT's causal LM calls the decoder in its body
    for body in bodies:
        body.forward = lambda *_, **__: Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        for body in bodies:
            del body.forward
