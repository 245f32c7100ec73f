"""A model's input groups, one at a time: the method's unit of work.

A *group* (`method.group`) is small enough to be held in memory whole. Its layers share one Gram matrix, which each step
reads once. It depends on no other group, so that any number of workers may share them.

**Reading ahead.** A thread reads the next group while this one is worked on: safetensors releases the interpreter's
lock while it reads, and so do matrix products. For a GPU the group is read into pinned memory and copied without
waiting, so that reading, copying and working overlap; results are copied to the host when they are written. One group
is read ahead and no more: memory is bounded by two groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.dense_sums import dense_sums, sums_of
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.overrides import check_patterns
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sums import AGAIN, StoredSums

#: Bytes of a group's weights above which its layers are worked on one by one; steps take up to nine times as many.
LARGE = 2**26


class Groups:
    """A model's groups in module order, each read when its turn comes.

    Args:
        checkpoint: the dense model.
        layers: its compressible layers.
        statistics: of their inputs; None where nothing is known of them: every layer is then a group of its own.
        device: where the groups are worked on.
        recipe: with other settings for some layers; see `treated_by`.
        only: names of the groups that are wanted; None for all.

    Attributes:
        key: by which another process knows groups that it has opened already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerMap,
        statistics: Statistics | None,
        device: torch.device | None = None,
        recipe: Recipe | None = None,
        only: frozenset[str] | None = None,
    ) -> None:
        self.checkpoint, self.layers, self.statistics = checkpoint, layers, statistics
        self.device = device or torch.device("cpu")
        self.recipe, self.only = recipe, only
        self.dense = dense_sums(checkpoint.path, statistics, self.device)
        self.key = uuid4().hex

    def __reduce__(self) -> tuple[Any, ...]:
        statistics = None if self.statistics is None else self.statistics.path
        return _reopened, (self.key, self.checkpoint.path, statistics, self.device, self.recipe, self.only)

    def treated_by(self, recipe: Recipe) -> Groups:
        """The same groups for a recipe: layers that it treats otherwise are apart, those that it leaves are in none.

        Raises:
            HwpqError: a pattern of the recipe means no layer.
        """
        check_patterns(recipe.overrides, self.layers.names)
        return self.limited(recipe, None) if recipe.overrides else self

    def of_block(self, block: int) -> Groups:
        """The groups of one decoder block."""
        return self.only_those(name for name, layers in self.members().items() if layers[0].block == block)

    def only_those(self, names: Iterable[str]) -> Groups:
        """Some of the groups, by their names."""
        return self.limited(self.recipe, frozenset(names))

    def limited(self, recipe: Recipe | None, only: frozenset[str] | None) -> Groups:
        """The same files, opened already, for another recipe and other names; see the class."""
        found = object.__new__(Groups)
        found.__dict__.update(self.__dict__, recipe=recipe, only=only)
        return found

    def members(self) -> dict[str, tuple[Layer, ...]]:
        """Layers by input group, in module order; a group has its first layer's name. Large layers are apart."""
        members: dict[tuple[str, Recipe | None], list[Layer]] = {}
        for layer in self.layers:
            name = layer.name if self.statistics is None else self.statistics.group_of(layer.name)
            own = None if self.recipe is None else self.recipe.for_layer(layer.name)
            if own is None or own.changes_weights:
                members.setdefault((name, own), []).append(layer)
        parts = (part for layers in members.values() for part in _parts(layers))
        found = {layers[0].name: layers for layers in parts}
        return {name: layers for name, layers in found.items() if self.only is None or name in self.only}

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


def open_groups(model: str | Path, statistics: str | Path | None, device: torch.device | None = None) -> Groups:
    """A checkpoint's input groups.

    Args:
        model: the dense checkpoint.
        statistics: directory of its inputs' sums; None for a recipe that needs none.
        device: where they are worked on; the CPU by default.
    """
    known = None if statistics is None else Statistics(statistics)
    return Groups(Checkpoint(model), layer_map(model), known, device)


def _reopened(
    key: str,
    model: Path,
    statistics: Path | None,
    device: torch.device,
    recipe: Recipe | None,
    only: frozenset[str] | None,
) -> Groups:
    """The groups in another process, which opens the files once."""
    return _open_once(key, model, statistics, device).limited(recipe, only)


@lru_cache(maxsize=1)
def _open_once(key: str, model: Path, statistics: Path | None, device: torch.device) -> Groups:
    found = open_groups(model, statistics, device)
    found.key = key
    return found
