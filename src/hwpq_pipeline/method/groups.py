"""A model's input groups, one at a time: the method's unit of work.

Layers that read the same tensor share one Gram matrix `G` (q/k/v; gate/up). Stacked along their rows they are one
matrix `W` of shape (Σ out_features, in_features), and every step of the method (select, prune, recover, round) treats
the rows of `W` independently given `G`. A *group* is therefore the unit of work. It is small enough to be held in
memory whole. Its layers share one `G`, which each step reads once. It depends on no other group, so that any number of
workers may share them.

**Reading ahead.** A thread reads the next group while this one is worked on: safetensors releases the interpreter's
lock while it reads, and so do matrix products. For a GPU the group is read into pinned memory and copied without
waiting, so that reading, copying and working overlap; results are copied to the host when they are written. One group
is read ahead and no more: memory is bounded by two groups.

**Executors.** An executor maps a step over groups and yields the results in the groups' order. `serial` does it here
and now; another one may hand groups to other processes, since steps and groups pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.recovery import output_error, relative_error, squared_error
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.dense_sums import dense_sums, sums_of
from hwpq_pipeline.method.overrides import check_patterns
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sums import AGAIN, InputSums, StoredSums

R = TypeVar("R")
#: Bytes of a group's weights above which its layers are worked on one by one; steps take up to nine times as many.
LARGE = 2**26
#: Columns of the layer table by layer name.
Facts = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """Layers with one input, stacked, on their way through the steps.

    Attributes:
        name: of the input group.
        layers: in module order.
        sums: of the inputs; None where a recipe needs no data.
        dtype: that the dense checkpoint stores, which scales are rounded to.
        original: the dense weights, stacked, shape (rows, in_features), float32.
        weight: the weights as the last step left them, same shape.
        mask: bool, same shape, true where a weight is kept; None when nothing is pruned.
        quantized: codes and scales of `weight`; None before rounding.
        energy: ‖w₀X‖² of every row, shape (rows,), once a step has needed it.
        facts: what the steps found out, by layer name: columns of the layer table.
    """

    name: str
    layers: tuple[Layer, ...]
    sums: InputSums | None
    dtype: torch.dtype
    original: Tensor
    weight: Tensor
    mask: Tensor | None = None
    quantized: Quantized | None = None
    energy: Tensor | None = None
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
    def known_gram(self) -> Tensor | None:
        """The Gram matrix where it is known; see `gram`."""
        found = None if self.sums is None else self.sums.gram()
        return None if found is None else found.to(self.original.device)

    @property
    def gram(self) -> Tensor:
        """The Gram matrix of the inputs, shape (in_features, in_features), float32; read once a step.

        Raises:
            HwpqError: only its diagonal, or nothing, is known of the inputs.
        """
        if self.known_gram is None:
            raise HwpqError(
                "the statistics hold no Gram matrix of its inputs",
                where=self.name,
                remedy="Set calibration mode to gram and run the calibrate pipeline again.",
            )
        return self.known_gram

    def with_measured_error(self, column: str) -> Group:
        """Note the weight's error as it stands; see `with_error`. It costs a matrix product, two the first time.

        Without a Gram matrix the error is not known and nothing is noted.
        """
        if self.known_gram is None:
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


class Groups:
    """A model's groups in module order, each read when its turn comes.

    Args:
        checkpoint: the dense model.
        layers: its compressible layers.
        statistics: of their inputs; None where nothing is known of them: every layer is then a group of its own.
        device: where the groups are worked on.
        recipe: with other settings for some layers; see `treated_by`.
        block: of which alone the groups are wanted; None for all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerMap,
        statistics: Statistics | None,
        device: torch.device | None = None,
        recipe: Recipe | None = None,
        block: int | None = None,
    ) -> None:
        self.checkpoint, self.layers, self.statistics = checkpoint, layers, statistics
        self.device = device or torch.device("cpu")
        self.recipe, self.block = recipe, block
        self.dense = dense_sums(checkpoint.path, statistics, self.device)

    def treated_by(self, recipe: Recipe) -> Groups:
        """The same groups for a recipe: layers that it treats otherwise are apart, those that it leaves are in none.

        Raises:
            HwpqError: a pattern of the recipe means no layer.
        """
        check_patterns(recipe.overrides, self.layers.names)
        return self._only(recipe, None) if recipe.overrides else self

    def of_block(self, block: int) -> Groups:
        """The groups of one decoder block."""
        return self._only(self.recipe, block)

    def _only(self, recipe: Recipe | None, block: int | None) -> Groups:
        found = copy(self)  # with the same `dense`
        found.recipe, found.block = recipe, block
        return found

    def members(self) -> dict[str, tuple[Layer, ...]]:
        """Layers by input group, in module order; a group has its first layer's name. Large layers are apart."""
        members: dict[tuple[str, Recipe | None], list[Layer]] = {}
        for layer in self.layers if self.block is None else self.layers.in_block(self.block):
            name = layer.name if self.statistics is None else self.statistics.group_of(layer.name)
            own = None if self.recipe is None else self.recipe.for_layer(layer.name)
            if own is None or own.changes_weights:
                members.setdefault((name, own), []).append(layer)
        parts = (part for layers in members.values() for part in _parts(layers))
        return {layers[0].name: layers for layers in parts}

    def input_of(self, group: str) -> str:
        """The input group in the statistics that a group, or a part of one, belongs to."""
        return group if self.statistics is None else self.statistics.group_of(group)

    def silent(self) -> list[str]:
        """Layers that no calibration token reached: all their inputs are zero. The energies alone are read.

        Raises:
            HwpqError: sums that are no sums of squares, or no token reached any layer.
        """
        if self.statistics is None:
            return []
        members = self.members()
        groups = [name for name in members if not bool(StoredSums(self.statistics, name).energy().any())]
        if members and len(groups) == len(members):
            raise HwpqError("all sums of all layers are zero", where=str(self.statistics.path), remedy=AGAIN)
        return [layer.name for name in groups for layer in members[name]]

    def seldom(self) -> dict[str, int]:
        """Groups that fewer tokens reached than they have inputs, though some did, with their tokens.

        So few leave directions that no token shows: what recovery and descent would do there is chance.
        """
        if self.statistics is None:
            return {}
        seldom = [name for name in self.members() if StoredSums(self.statistics, name).seldom]
        return {name: self.statistics.tokens_of(name) for name in seldom}

    def __iter__(self) -> Iterator[Group]:
        """The groups in order; while one is worked on, the next is read.

        Raises:
            HwpqError: a weight is damaged.
        """
        waiting = iter(self.members().items())
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
            if (stored := layer.stored.shape(self.checkpoint.shape(layer.stored.tensor))) != layer.shape:
                raise HwpqError(
                    f"weight has shape {stored}, the config says {layer.shape}",
                    where=layer.name,
                    remedy="Fetch the model again: weights and config do not belong together.",
                )
        with torch.inference_mode():  # of this thread
            weight = torch.cat([self.checkpoint.weight(layer.stored) for layer in layers])
            if self.device.type == "cuda":
                weight = weight.pin_memory()
        return Group(
            name, layers, sums_of(name, self.statistics, self.dense), self.checkpoint.torch_dtype, weight, weight
        )


def _parts(layers: list[Layer]) -> Iterator[tuple[Layer, ...]]:
    """The layers together, or one by one where together they are large: rows do not depend on one another."""
    large = 4 * sum(prod(layer.shape) for layer in layers) > LARGE
    return ((layer,) for layer in layers) if large else iter([tuple(layers)])


class Executor(Protocol):
    """Maps a step over groups, results in the groups' order."""

    def __call__(self, step: Callable[[Group], R], groups: Iterable[Group]) -> Iterator[R]:
        """`step(group)` of every group."""


def serial(step: Callable[[Group], R], groups: Iterable[Group]) -> Iterator[R]:
    """One group after the other, in this process."""
    with torch.inference_mode():
        for group in groups:
            yield step(group)


def open_groups(model: str | Path, statistics: str | Path | None, device: torch.device | None = None) -> Groups:
    """A checkpoint's input groups.

    Args:
        model: the dense checkpoint.
        statistics: directory of its inputs' sums; None for a recipe that needs none.
        device: where they are worked on; the CPU by default.
    """
    known = None if statistics is None else Statistics(statistics)
    return Groups(Checkpoint(model), layer_map(model), known, device)
