"""Keeping the dense model's routes: which experts each token goes to.

A router scores the experts and takes the best few by `topk`, or the best one by `max`. In a compressed model the scores
move a little, and some tokens would go to other experts than in the dense model. Then nothing could be said of what an
expert should give for them. So the choices that the dense block makes are written down, and the compressed block is
given the same ones, with its own scores. Where nothing is routed, nothing is written down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hwpq_pipeline.checkpoints.structure import experts_of

#: What torch's functions that choose give.
_CHOICES = (torch.return_types.topk, torch.return_types.max)


class Routes:
    """The choices of one decoder block's routers.

    Args:
        block: the block; without experts nothing is watched.
    """

    def __init__(self, block: nn.Module) -> None:
        self.routed = any(experts_of(module) > 1 for module in block.modules())
        self.chosen: list[Tensor] = []

    def kept(self) -> TorchFunctionMode:
        """A context in which the choices are written down."""
        self.chosen.clear()
        return _Routing(self, replay=False)

    def replayed(self) -> TorchFunctionMode:
        """A context in which the same choices are made again, in the same order."""
        return _Routing(self, replay=True)


class _Routing(TorchFunctionMode):
    def __init__(self, routes: Routes, *, replay: bool) -> None:
        super().__init__()
        self.routes, self.replay, self.at = routes, replay, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; note what it chooses, or choose it again."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not self.routes.routed or not isinstance(found, _CHOICES):
            return found
        if not self.replay:
            self.routes.chosen.append(found.indices)
            return found
        chosen = self.routes.chosen[self.at]
        self.at += 1
        kept = isinstance(found, torch.return_types.topk) or found.indices.dim() == args[0].dim()
        place = 2 if isinstance(found, torch.return_types.topk) else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        values = args[0].gather(dim, chosen) if kept else args[0].gather(dim, chosen.unsqueeze(dim)).squeeze(dim)
        return type(found)((values, chosen))
