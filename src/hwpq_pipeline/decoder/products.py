"""Seeing every product of activations with a layer's weight, whatever module makes it.

A linear layer is known by its weight's memory, not by its module's class: `nn.Linear` calls `linear(x, W)`, `Conv1D`
calls `addmm(b, x, W)`, a subclass may write `x @ W.T`, experts multiply their slice of a stack, or all slices at once.
`Products` is a torch function mode. It looks at the factors of each product: where one lies in the memory of a watched
weight, the other one is the layer's input. So the input of an expert is what was routed to it.

The contracted dimension is read off the strides. A layer map that holds a stack the wrong way round is refused there.

Experts must run one by one or stacked, not in a fused kernel that hides its products (`load_dense` sees to that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.errors import HwpqError

#: Functions that multiply matrices, by name, and where their two factors stand.
_PRODUCTS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "__rmatmul__": (1, 0),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}

#: Layers that lie in one matrix of the module tree, from top to bottom, and their inputs (…, in_features).
Before = Callable[[tuple[Layer, ...], Tensor], None]
#: The same, and their outputs (…, out_features of all).
After = Callable[[tuple[Layer, ...], Tensor, Tensor], None]
#: The layers, their inputs, and the gradient of their outputs.
Backward = Callable[[tuple[Layer, ...], Tensor, Tensor], None]


def _nothing(*_: Any) -> None: ...


class Products(TorchFunctionMode):
    """Calls back before and after each product with a watched weight, while it is entered.

    Args:
        layers: the layers to watch.
        parameters: their weights by their names in the module tree.
        before: called with the layers and their inputs, before the product; it may change the weights in place.
        after: called with the layers, their inputs and their outputs.
        backward: called with the layers, their inputs and the gradient of their outputs, once a backward pass has it.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        parameters: Mapping[str, Tensor],
        *,
        before: Before = _nothing,
        after: After = _nothing,
        backward: Backward | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after, self.backward = before, after, backward
        spots: dict[tuple[str, int], list[Layer]] = {}
        for layer in layers:
            spots.setdefault((layer.place.tensor, layer.place.part), []).append(layer)
        self.at: dict[int, tuple[Layer, ...]] = {}
        for (name, part), inside in spots.items():
            tensor, parts = parameters[name], inside[0].place.parts
            step = tensor.numel() // parts * tensor.element_size()
            self.at[tensor.data_ptr() + part * step] = tuple(inside)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; before and after a watched product, the callbacks."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _PRODUCTS:
            return func(*args, **kwargs)
        factors = _factors(name, args, kwargs)
        if factors is None:
            return func(*args, **kwargs)
        met = list(self._met(name, *factors))
        for layers, x, _ in met:  # torch calls no mode from inside the mode: the callbacks' own products are not seen
            self.before(layers, x)
        result = func(*args, **kwargs)
        for layers, x, output in met:
            self.after(layers, x, output(result))
            if self.backward is not None and result.requires_grad:
                result.register_hook(partial(_told, self.backward, layers, x.detach(), output))
        return result

    def _met(
        self, name: str, one: Tensor, other: Tensor
    ) -> Iterator[tuple[tuple[Layer, ...], Tensor, Callable[[Tensor], Tensor]]]:
        """The watched layers among the factors, each with its input and what takes its output from the result."""
        if name == "linear":
            other = other.T
        if other.dim() in (2, 3):  # x @ W, where W is (in, out)
            for index, layers, weight in self._matrices(other):
                _check(layers, weight.T)
                yield layers, one if index is None else one[index], partial(_outputs, index=index, turned=False)
        if one.dim() in (2, 3):  # W @ xᵀ, where W is (out, in)
            for index, layers, weight in self._matrices(one):
                _check(layers, weight)
                x = (other if index is None else other[index]).transpose(-1, -2)
                yield layers, x, partial(_outputs, index=index, turned=True)

    def _matrices(self, factor: Tensor) -> Iterator[tuple[int | None, tuple[Layer, ...], Tensor]]:
        """The watched matrices in a factor, each with its index in a stack, its layers, and as the product reads it."""
        matrices = [(None, factor)] if factor.dim() == 2 else list(enumerate(factor))
        for index, matrix in matrices:
            layers = self.at.get(matrix.data_ptr())
            if layers and matrix.numel() == sum(layer.shape[0] * layer.shape[1] for layer in layers):
                yield index, layers, matrix


def _told(
    backward: Backward, layers: tuple[Layer, ...], x: Tensor, output: Callable[[Tensor], Tensor], gradient: Tensor
) -> None:
    backward(layers, x, output(gradient))


def _check(layers: tuple[Layer, ...], weight: Tensor) -> None:
    """Refuse a weight that is contracted over another dimension than the layer map says; `weight` is (out, in)."""
    rows, columns = sum(layer.shape[0] for layer in layers), layers[0].shape[1]
    strides = (1, rows) if layers[0].place.transposed else (columns, 1)
    if tuple(weight.shape) != (rows, columns) or (min(rows, columns) > 1 and weight.stride() != strides):
        raise HwpqError(
            f"the model multiplies a weight of shape {tuple(weight.shape)}, not of {(rows, columns)}",
            where=layers[0].name,
            remedy="This architecture's layers are not read as they are multiplied; please report it.",
        )


def _factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two factors of a product; None if they are not given by position, or are no tensors."""
    if name == "linear":
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        found = [named.get("input"), named.get("weight")]
    else:
        first, second = _PRODUCTS[name]
        found = [args[place] if place < len(args) else None for place in (first, second)]
    one, other = found
    return (one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else None


def _outputs(result: Tensor, *, index: int | None, turned: bool) -> Tensor:
    """A product's outputs (…, out_features), or those of one slice of a stacked product.

    Args:
        result: of the product.
        index: of the slice; None if nothing is stacked.
        turned: whether the outputs stand in columns.
    """
    found = result if index is None else result[index]
    return found.transpose(-1, -2) if turned else found
