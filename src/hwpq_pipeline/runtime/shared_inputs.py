"""Packed layers that read one input, multiplied in one call: q/k/v, gate/up.

A small layer's product is short beside the call, so three calls cost more than one over all their rows. Which layers
share an input is found by running the model on one token: those that get one and the same tensor. Nothing is taken
from names. The first layer that is called multiplies for all, and the others take their rows of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.kernels.packed_linear import Packed, packed_linear
from hwpq_pipeline.kernels.packed_linear.layout import ROWS

from .packed_linear import PackedLinear


class SharedProduct:
    """The product of several layers with the input that they share.

    Args:
        layers: of one kind of values, one width and one number of scale groups; their weights become parts of one.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        first = layers[0].weight
        self.kernel = layers[0].kernel
        self.heights = [layer.out_features for layer in layers]
        parts = ([getattr(layer.weight, name) for layer in layers] for name in ("values", "places", "scale"))
        values, places, scale = (torch.cat(part) for part in parts)
        self.weight = Packed(values, places, scale, first.kind, (sum(self.heights), first.shape[1]))
        biases = [layer.bias for layer in layers]
        self.bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(biases, self.heights, strict=True)
            self.bias = torch.cat([torch.zeros(rows) if bias is None else bias for bias, rows in pairs])
        self.latest: tuple[Tensor | None, dict[int, Tensor]] = (None, {})
        start = 0
        for number, layer in enumerate(layers):
            stop = start + layer.weight.values.shape[0]
            mine = slice(start, stop)
            layer.weight = Packed(values[mine], places[mine], scale[mine], first.kind, layer.weight.shape)
            layer.shared = (self, number)
            start = stop

    def part(self, number: int, x: Tensor) -> Tensor:
        """One layer's rows of the product; kept until all layers have had theirs.

        Args:
            number: of the layer.
            x: (…, in).
        """
        given, left = self.latest  # read and set as one: another thread may run the model on other inputs
        mine = left.pop(number, None) if given is x else None
        if mine is None:
            found = packed_linear(self.weight, x, self.bias, kernel=self.kernel).split(self.heights, dim=-1)
            left = dict(enumerate(found))
            mine, self.latest = left.pop(number), (x, left)
        if not left:
            self.latest = (None, {})
        return mine


def share_products(model: Any) -> None:
    """Let the packed layers of a model that read one input multiply in one call.

    Args:
        model: a causal LM whose layers are `PackedLinear`.
    """
    met: list[tuple[Tensor, PackedLinear]] = []
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: met.append((given[0], layer))) for layer in layers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[PackedLinear]] = {}
    for x, layer in met:  # the tensors are alive, so no two have one number
        weight = layer.weight
        groups.setdefault((id(x), weight.kind, weight.scale.shape[1], layer.kernel), []).append(layer)
    for group in groups.values():
        whole = [layer for layer in dict.fromkeys(group) if layer.out_features % ROWS == 0]
        if len(whole) > 1:
            SharedProduct(whole)
