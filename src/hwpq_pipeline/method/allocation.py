"""What each layer gets of a budget: costs from shapes, losses from trial steps, the sharing by `method.budget`.

A loss is predicted by the layer's error on the calibration inputs and by what errors of its outputs do to the model's
answer (`calibration.sensitivity`). A group of layers with one input is the unit of choice, as engines that fuse such
layers want it. The error of a choice is that of its steps on the dense model's inputs, whatever the recipe's schedule.

Nothing here sees anything but calibration tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.calibration.sensitivity import output_gradients
from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.budget import Option, Shared, share_out, stored_bytes, table_bytes, tables_bytes
from hwpq_pipeline.method.fitting import misfit
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.groups import Groups
from hwpq_pipeline.method.overrides import NOTHING, Override
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Budget, Choice
from hwpq_pipeline.method.select import select_group
from hwpq_pipeline.method.steps import take_steps
from hwpq_pipeline.progress import progress_bar

logger = logging.getLogger(__name__)

#: Of an export's header, for each tensor: name, shape, place and checksum.
_HEADER_BYTES = 300
_TENSORS_OF_A_LAYER = 3


def choose_layers(
    groups: Groups, recipe: Recipe, tokens: np.ndarray[Any, Any] | Tensor, *, where: str
) -> dict[str, str]:
    """The budget's choice for each layer, by name; nothing for a recipe without a budget.

    A choice whose groups or structure do not divide a layer's columns is none for that layer.

    Args:
        groups: of the dense model.
        recipe: with the budget.
        tokens: (samples, length) calibration tokens.
        where: the variant, for errors and the log.

    Raises:
        HwpqError: the smallest choices do not fit, there are no statistics, or a step cannot be taken.
    """
    budget = recipe.budget
    if budget is None:
        return {}
    if groups.statistics is None:
        raise HwpqError("a budget needs statistics of the inputs", where=where, remedy="Run calibrate first.")
    cost = _Cost(groups, recipe, budget)
    trials = {choice.name: _trial(recipe, budget, choice, groups) for choice in budget.choices}
    some = next(choice for choice in budget.choices if choice.selection or choice.quantization)
    parts = groups.treated_by(trials[some.name])
    free = parts.members()
    options: list[Option] = []
    met: set[str] = set()
    priced = 0
    chosen_by = tokens[: budget.samples]
    if len(chosen_by) < budget.samples:
        logger.warning(
            "%s: budget.samples is %d, and there are %d calibration samples.", where, budget.samples, len(chosen_by)
        )
    with progress_bar("select: choices, input groups") as bar, torch.no_grad():
        for number, seen in output_gradients(groups.checkpoint.path, chosen_by, device=groups.device):
            for group in parts.of_block(number):
                if group.name in free:
                    met |= {layer.name for layer in group.layers if layer.name in seen}
                    seen_by = [seen.get(layer.name, []) for layer in group.layers]
                    for choice, trial in zip(budget.choices, trials.values(), strict=True):
                        if misfit(group.layers[0], trial.for_layer(group.layers[0].name)):
                            continue
                        loss = _loss(group, trial, seen_by) / np.prod(np.shape(chosen_by))
                        options.append(Option(group.name, choice.name, cost.of(group.layers, choice), loss))
                    priced += 1
                    bar(priced, len(free))
    _warn_of_unseen(free, met, where)
    shared = share_out(options, cost.limit, where)
    _tell(shared, cost, where)
    return {layer.name: shared.chosen[name] for name, layers in free.items() for layer in layers}


def _trial(recipe: Recipe, budget: Budget, choice: Choice, groups: Groups) -> Recipe:
    """The recipe in which every layer takes one choice, each layer for itself; the descent sweeps once.

    Further sweeps lower the errors of all grids alike, so that they would not change what is chosen. Layers that the
    variant's own overrides decide on stay as they are, and so in groups of their own.
    """
    rounding = choice.quantization
    if rounding is not None and rounding.sweeps is not None:
        choice = replace(choice, quantization=replace(rounding, sweeps=1))
    alone = replace(recipe, budget=replace(budget, choices=(choice,)), sequence=None, healing=None)
    names = groups.layers.names
    fixed = tuple(name for name in names if not recipe.leaves_open(name))
    trial = alone.with_choices(dict.fromkeys(names, choice.name))
    return replace(trial, overrides=(*trial.overrides, *((Override(fixed, NOTHING),) if fixed else ())))


def _loss(group: Group, trial: Recipe, seen: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> float:
    """½ Σ_t Σ_r (g_tr · (Δw_r x_t))² after a choice.

    Args:
        group: as it came.
        trial: the recipe of the choice.
        seen: of each of its layers, inputs (tokens, in) and gradients (tokens, out).
    """
    if not trial.for_layer(group.layers[0].name).changes_weights:
        return 0.0
    change = take_steps(group, select_group(group, trial).masks, trial).weight - group.original
    return sum(
        0.5 * float(((x @ change[rows].T) * gradient).square().sum(dtype=torch.float64))
        for (_, rows), pairs in zip(group.rows, seen, strict=True)
        for x, gradient in pairs
    )


@dataclass(frozen=True)
class _Cost:
    """Bytes, in the sense of the budget's kind."""

    groups: Groups
    recipe: Recipe
    budget: Budget

    @property
    def read(self) -> bool:
        """Whether it is the bytes that a token reads which count, and not those of the export."""
        return self.budget.kind == "decode_speed_ratio"

    def of(self, layers: tuple[Layer, ...], choice: Choice) -> int:
        """Of a group's layers after a choice."""
        return sum(self._bytes(layer, choice) for layer in layers)

    def _bytes(self, layer: Layer, choice: Choice) -> int:
        return stored_bytes(layer, choice, packed=self.read, dense=self._dense)

    @property
    def _dense(self) -> int:
        return self.groups.checkpoint.torch_dtype.itemsize

    @cached_property
    def free(self) -> list[Layer]:
        """The layers that the budget decides on."""
        return [layer for layer in self.groups.layers if self.recipe.leaves_open(layer.name)]

    @property
    def limit(self) -> float:
        """What the free layers may cost, bytes."""
        limit, weights = self.budget.limit, sum(rows * columns for rows, columns in (one.shape for one in self.free))
        if self.budget.kind == "bits_per_weight":
            return limit * weights / 8
        if self.read:
            return (self._dense_layers + self._head(None)) / limit - self._head(self.recipe.embeddings) - self._fixed
        total = limit * self._dense_total if self.budget.kind == "ratio" else limit
        return total - self._others - self._fixed - self._headers

    @property
    def _dense_total(self) -> int:
        return self.groups.checkpoint.size_bytes

    @property
    def _dense_layers(self) -> int:
        return sum(self._bytes(layer, Choice("dense")) for layer in self.groups.layers)

    @property
    def _fixed(self) -> int:
        """Of the layers that overrides decide on."""
        fixed = [layer for layer in self.groups.layers if not self.recipe.leaves_open(layer.name)]
        parts = [(layer, self.recipe.for_layer(layer.name)) for layer in fixed]
        return sum(self._bytes(layer, Choice("", own.selection, own.quantization)) for layer, own in parts)

    @property
    def _others(self) -> int:
        """Of what is no compressible layer, embedding and head after their rounding."""
        shapes = [table.shape for table in self.groups.layers.tables]
        saved = tables_bytes(shapes, None, self._dense) - tables_bytes(shapes, self.recipe.embeddings, self._dense)
        return self._dense_total - self._dense_layers - saved

    @property
    def _headers(self) -> int:
        return _HEADER_BYTES * (len(self.groups.checkpoint.names) + _TENSORS_OF_A_LAYER * len(self.free))

    def _head(self, grid: str | None) -> int:
        return sum(table_bytes(table.shape, grid, self._dense) for table in self.groups.layers.tables[-1:])


def _warn_of_unseen(free: Mapping[str, tuple[Layer, ...]], met: set[str], where: str) -> None:
    """Of experts that no token of the budget's samples reached, nothing is predicted: they get the smallest choice."""
    unseen = [layer.name for layers in free.values() for layer in layers if layer.name not in met]
    if unseen:
        logger.warning(
            "%s: no token of the budget's samples reached %d layers, first %s. They get the smallest choice; set "
            "budget.samples higher.", where, len(unseen), unseen[0],
        )  # fmt: skip


def _tell(shared: Shared, cost: _Cost, where: str) -> None:
    counts: Mapping[str, int] = Counter(shared.chosen.values())
    told = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items(), key=lambda one: -one[1]))
    logger.info("%s, by input groups: %s.", where, told)
    logger.info(
        "%s: these layers take %.1f MB of the %.1f MB that are left for them. Predicted loss %.4f nats a token, gap to "
        "the best sharing %.2g.", where, shared.cost / 1e6, cost.limit / 1e6, shared.loss, shared.gap,
    )  # fmt: skip
    taken = [choice for choice in cost.budget.choices if choice.name in counts]
    if cost.read and len(taken) > 1 and any(choice.selection is not None for choice in taken):
        logger.warning(
            "%s: 2:4 layers count as packed, and no export packs them beside others: this speed is a prediction for an "
            "engine to come.", where,
        )  # fmt: skip
    if all(choice.selection is None for choice in cost.budget.choices if choice.name in counts) and any(
        choice.selection is not None for choice in cost.budget.choices
    ):
        logger.info("%s: no layer is pruned: under this budget rounding alone costs less quality.", where)
