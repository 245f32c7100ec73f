"""A group on its way through the steps: layers that read one tensor, stacked along their rows.

They share one Gram matrix `G` (q/k/v; gate/up). Stacked they are one matrix `W` of shape (Σ out_features, in_features),
and every step of the method (select, prune, recover, round) treats the rows of `W` independently given `G`. A step
takes a group and gives one: what it found stands in `facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.recovery import output_error, relative_error, squared_error
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.sums import InputSums

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
