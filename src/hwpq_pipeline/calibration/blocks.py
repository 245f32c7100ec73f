"""The sums over the inputs of one decoder block's linear layers.

`BlockSums` sees the products that the block makes (`decoder.products`). Layers that are fed by the same tensor share
one sum. They are found by the memory that they read, and nothing is assumed from their names. An expert's sum is over
the tokens that were routed to it, and their number is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hwpq_pipeline.checkpoints.layers import Layer, LayerMap
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.decoder.products import Products
from hwpq_pipeline.errors import HwpqError


class BlockSums:
    """The sums of one decoder block's inputs, filled by the products that it makes.

    The first layer to meet a tensor leads its group and sums it. The others that meet the same memory before the
    batch ends join the group. Tensors are held until then, so that no address can be used twice.

    Args:
        plan: the model's compressible layers.
        number: index of the block.
        kind: which sum.
    """

    def __init__(self, plan: LayerMap, number: int, kind: type[Gram] | type[Energy]) -> None:
        self.members = plan.in_block(number)
        self.layers = {layer.name: layer.shape[1] for layer in self.members}
        self.kind = kind
        self.sums: dict[str, Gram | Energy] = {}
        self.tokens: dict[str, int] = {}
        self.leader_of: dict[str, str] = {}
        self.seen: list[tuple[torch.Tensor, str]] = []
        self.pausing = False

    def watched(self, parameters: Mapping[str, torch.Tensor]) -> Products:
        """A context in which the block's products are summed.

        Args:
            parameters: the model's, by name.
        """
        return Products(self.members, parameters, before=self._meet)

    def unseen(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call a function whose products are not summed."""
        self.pausing = True
        try:
            return run()
        finally:
            self.pausing = False

    def _meet(self, layers: tuple[Layer, ...], x: torch.Tensor) -> None:
        if self.pausing:
            return
        first = layers[0].name
        leader = next((other for seen, other in self.seen if _same_memory(seen, x)), first)
        for layer in layers:
            if self.leader_of.setdefault(layer.name, leader) != leader:
                raise HwpqError(
                    f"it shares its input with {leader} in one batch and not in another",
                    where=layer.name,
                    remedy="This architecture changes the inputs that its layers share, which is not supported.",
                )
        if leader == first:
            self.seen.append((x, first))
            self._add(first, x)

    def _add(self, name: str, x: torch.Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = self.kind(self.layers[name], x.device)
        rows = x.reshape(-1, self.layers[name])
        self.sums[name].add(rows)
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

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
        """Each group's sum, on the CPU, by the group's name. It is handed over: there is no second call.

        Raises:
            HwpqError: an input was NaN or infinite.
        """
        found = {}
        for name, _ in groups:
            total = self.sums.pop(self.leader_of.get(name, name), None) or self.kind(self.layers[name], device)
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
