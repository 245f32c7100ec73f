"""A packed model is for inference, and fixed: what would save it, or change its weights, is refused in one line.

Its weights are no parameters, so transformers would write a model without them, and say nothing. To copy, to pickle and
to move it are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from hwpq_pipeline.errors import HwpqError

_SAVE = ("save_pretrained", "push_to_hub")
#: These ask an embedding and a head for the weight, which codes are not.
_CHANGE = ("resize_token_embeddings", "tie_weights")


class Fixed(nn.Module):
    """A module whose weight is no parameter of torch's."""

    def _save_to_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        _refuse_to_save()


def fix(model: Any, *, codes: bool) -> Any:
    """A loaded model whose parameters want no gradients, and that refuses what it cannot do.

    Args:
        model: of transformers, whose packed layers are `Fixed` on the CPU.
        codes: whether its embedding or head is in codes.
    """
    model.requires_grad_(requires_grad=False)
    for name in _SAVE:  # before transformers makes a folder
        setattr(model, name, _refuse_to_save)
    for name in _CHANGE if codes else ():
        setattr(model, name, functools.partial(_refuse_to_change, name))
    return model


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise HwpqError("a packed model is not saved", where="packed model", remedy="Copy the export's folder.")


def _refuse_to_change(name: str, *_: Any, **__: Any) -> NoReturn:
    raise HwpqError(
        f"{name} needs weights, and the embedding or head of this model is in codes",
        where="packed model",
        remedy="Load it without native=True, or change the dense model.",
    )
