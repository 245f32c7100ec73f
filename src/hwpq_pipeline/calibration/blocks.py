"""The sums over the inputs of one decoder block's linear layers.

`BlockSums` hooks the linear layers. Layers that are fed by the same tensor share one sum. The hooks find them by the
memory that they read, and assume nothing from their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hwpq_pipeline.checkpoints.layers import LayerMap
from hwpq_pipeline.decoder.gram import Energy, Gram
from hwpq_pipeline.errors import HwpqError


class BlockSums:
    """The sums of one decoder block's inputs, filled by hooks on its linear layers.

    The first layer to meet a tensor leads its group and sums it. The others that meet the same memory before the
    batch ends join the group. Tensors are held until then, so that no address can be used twice.

    Args:
        plan: the model's compressible layers.
        number: index of the block.
        kind: which sum.
    """

    def __init__(self, plan: LayerMap, number: int, kind: type[Gram] | type[Energy]) -> None:
        self.layers = {layer.name: layer.shape[1] for layer in plan.in_block(number)}
        self.prefix = f"{plan.blocks_name}.{number}."
        self.kind = kind
        self.sums: dict[str, Gram | Energy] = {}
        self.leader_of: dict[str, str] = {}
        self.seen: list[tuple[torch.Tensor, str]] = []

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
        if name not in self.sums:
            self.sums[name] = self.kind(self.layers[name], x.device)
        self.sums[name].add(x.reshape(-1, self.layers[name]))

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
