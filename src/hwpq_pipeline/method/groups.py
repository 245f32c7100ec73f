"""Working through a model one input group at a time.

Layers fed by the same tensor share one Gram matrix `G` (q/k/v; gate/up). Stacked along their rows they are
one matrix `W` of shape (Σ out_features, in_features), and every step of the method (select, prune, recover,
round) treats the rows of `W` independently given `G`. A *group* is therefore the unit of work: small enough
that memory is bounded by one `(W, G)`, whole enough that `G` is read once, and independent of every other,
so that any number of workers may share them.

**Reading ahead.** A thread reads the next group while this one is worked on: safetensors' reading lets go of the
interpreter's lock, and so do products. For a GPU the group is read into pinned memory and copied without waiting, so
that reading, copying and working overlap; what a step's results cost to bring back is paid where they are written. One
group is read ahead and no more: memory is bounded by two groups.

`Groups` is lazy: `then` composes steps and computes nothing; `run` takes all steps on one group and lets it go
before the next. The nodes of a pipeline hand it on in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import Layer, LayerMap
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.grids import Quantized
from hwpq_pipeline.compression.recovery import output_error, relative_error, squared_error
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import with_progress


class InputStatistics(Protocol):
    """What the steps need to know of a layer's inputs (`calibration.statistics.Statistics`)."""

    @property
    def mode(self) -> str:
        """`gram`, or `diagonal` where only the energies were collected."""

    def group_of(self, layer: str) -> str:
        """Name of the input group that feeds a layer."""

    def gram(self, group: str) -> Tensor:
        """Σ x xᵀ over the calibration tokens, shape (in_features, in_features), float32."""

    def energy(self, group: str) -> Tensor:
        """Its diagonal, shape (in_features,), float32."""


@dataclass(frozen=True)
class Group:
    """Layers with one input, stacked, on their way through the steps.

    Attributes:
        name: of the input group.
        layers: in module order.
        statistics: of the inputs.
        original: the dense weights, stacked, shape (rows, in_features), float32.
        weight: the weights as the last step left them, same shape.
        mask: bool, same shape, true where a weight is kept; None when nothing is pruned.
        quantized: codes and scales of `weight`; None before rounding.
        energy: ‖w₀X‖² of every row, shape (rows,), once a step has needed it.
        facts: what the steps found out, by layer name: columns of the layer table.
    """

    name: str
    layers: tuple[Layer, ...]
    statistics: InputStatistics
    original: Tensor
    weight: Tensor
    mask: Tensor | None = None
    quantized: Quantized | None = None
    energy: Tensor | None = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> tuple[tuple[Layer, slice], ...]:
        """Each layer and its rows in the stack."""
        found, start = [], 0
        for layer in self.layers:
            found.append((layer, slice(start, start + layer.shape[0])))
            start += layer.shape[0]
        return tuple(found)

    def with_weight(self, weight: Tensor, **changes: Any) -> Group:
        """The same group with another weight (and mask, or codes)."""
        return replace(self, weight=weight, **changes)

    @cached_property
    def gram(self) -> Tensor:
        """The Gram matrix of the inputs, shape (in_features, in_features), float32; read once a step."""
        return self.statistics.gram(self.name).to(self.original.device)

    def with_measured_error(self, column: str) -> Group:
        """Note the weight's error as it stands; see `with_error`. It costs a matrix product, two the first time.

        Without a Gram matrix (statistics of mode `diagonal`) the error is not known and nothing is noted.
        """
        if self.statistics.mode == "diagonal":
            return self
        if self.energy is None:
            error, energy = output_error(self.weight, self.original, self.gram)
        else:
            error, energy = squared_error(self.weight - self.original, self.gram), self.energy
        return self.with_error(column, error, energy)

    def with_error(self, column: str, error: Tensor, energy: Tensor) -> Group:
        """Note each layer's relative squared output error ‖(W−W₀)X‖²/‖W₀X‖².

        Args:
            column: of the layer table.
            error: ‖(w−w₀)X‖² of every row, shape (rows,).
            energy: ‖w₀X‖² of every row, shape (rows,); kept for the steps that follow.
        """
        facts = {
            layer.name: {**self.facts.get(layer.name, {}), column: relative_error(error[rows], energy[rows])}
            for layer, rows in self.rows
        }
        return replace(self, facts=facts, energy=energy)


Step = Callable[[Group], Group]


class Groups:
    """The groups of a model, in module order, with the steps to take on each.

    Args:
        checkpoint: the dense model.
        layers: its compressible layers.
        statistics: of their inputs.
        steps: composed by `then`.
        device: where the groups are worked on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerMap,
        statistics: InputStatistics,
        steps: Sequence[Step] = (),
        device: torch.device | None = None,
    ) -> None:
        self.checkpoint, self.layers, self.statistics, self.steps = checkpoint, layers, statistics, tuple(steps)
        self.device = device or torch.device("cpu")

    def then(self, step: Step) -> Groups:
        """The same groups with one more step."""
        longer = copy(self)
        longer.steps = (*self.steps, step)
        return longer

    def members(self) -> dict[str, tuple[Layer, ...]]:
        """Layers by input group, in module order."""
        members: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            name = self.statistics.group_of(layer.name)
            members[name] = (*members.get(name, ()), layer)
        return members

    def run(self, description: str) -> Iterator[Group]:
        """Take all steps on one group after the other, behind a progress bar.

        Raises:
            HwpqError: a weight is damaged, or a step cannot be taken.
        """
        members = self.members()
        with torch.inference_mode():
            for group in with_progress(self._read_ahead(members.items()), description, len(members)):
                for step in self.steps:
                    group = step(group)
                yield group

    def _read_ahead(self, members: Iterable[tuple[str, tuple[Layer, ...]]]) -> Iterator[Group]:
        """The groups in order, the next one being read meanwhile."""
        waiting = iter(members)
        with ThreadPoolExecutor(1, thread_name_prefix="groups") as reader:

            def begin() -> Future[Group] | None:
                following = next(waiting, None)
                return None if following is None else reader.submit(self._read, *following)

            future = begin()
            while future is not None:
                group = future.result()
                future = begin()
                yield self._placed(group)

    def _placed(self, group: Group) -> Group:
        """The group on the device; the copy from pinned memory does not wait, later work on the device does."""
        if self.device.type == "cpu":
            return group
        weight = group.weight.to(self.device, non_blocking=True)
        return replace(group, original=weight, weight=weight)

    def _read(self, name: str, layers: tuple[Layer, ...]) -> Group:
        for layer in layers:
            if (stored := tuple(self.checkpoint.shape(f"{layer.name}.weight"))) != layer.shape:
                raise HwpqError(
                    f"weight has shape {stored}, the config says {layer.shape}",
                    where=layer.name,
                    remedy="Fetch the model again: weights and config do not belong together.",
                )
        with torch.inference_mode():  # of this thread
            weight = torch.cat([self.checkpoint.weight(layer.name) for layer in layers])
            if self.device.type == "cuda":
                weight = weight.pin_memory()
        return Group(name, layers, self.statistics, weight, weight)
