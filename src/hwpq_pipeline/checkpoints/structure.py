"""Which tensors of a decoder block are linear layers' weights, told by structure and not by names.

- `nn.Linear` and its subclasses: (out_features, in_features).
- `Conv1D` (GPT-2 and its kin), a linear layer that holds its weight transposed.
- Stacks of experts: a parameter of a module that knows its number of experts, with a matrix for each of them. It has
  three dimensions, or two with the experts' rows one after another (DBRX).

A stack does not say which of its two dimensions is contracted. Modules in transformers' common form do
(`is_transposed`). For the others the width of the hidden states tells it: experts read it first and write it last.
Square stacks do not tell, and are taken as (out, in); DBRX's are known.
Calibration sees the real products and refuses a layer that was read the wrong way round (`decoder.products`).

Routers stay as they are: they are small, and what they decide is not a sum that rounding could average out. A router
is a linear layer with as many outputs as there are experts beside it, or with one. Layers with fewer inputs than the
smallest group of columns that shares a scale stay as they are, too: they are a handful of numbers that steer others.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from hwpq_pipeline.checkpoints.matrices import Matrix

#: Inputs of the narrowest layer that is compressed. Below, scales and headers would outweigh what is saved.
NARROWEST = 32
#: Attributes in which modules hold their number of experts.
_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts")
#: Experts' last layer, in the names that are in use. Its outputs are as wide as the hidden states.
_WRITES = re.compile(r"(down|output|out_|w2|wo\b|c_proj)")


def linear_weights(block: nn.Module, hidden: int) -> Iterator[Matrix]:
    """The weights of a block's linear layers in module order, each as a `Matrix` of the block's parameters.

    Args:
        block: a decoder block.
        hidden: width of the hidden states.
    """
    routers = set(_routers(block))
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if is_linear(module):
                if name == "weight" and path not in routers and inputs_of(module) >= NARROWEST:
                    yield Matrix(full, transposed=is_transposed_linear(module))
                continue
            experts = experts_of(module)
            shape = tuple(parameter.shape)
            stacked = len(shape) == 3 and shape[0] == experts
            joined = len(shape) == 2 and experts > 1 and shape[0] > experts and shape[0] % experts == 0
            if stacked or joined:
                high, wide = (shape[1] if stacked else shape[0] // experts), shape[-1]
                transposed = _transposed(module, full, high, wide, hidden)
                yield from (Matrix(full, part, experts, transposed) for part in range(experts))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, `Conv1D` included."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def inputs_of(module: Any) -> int:
    """in_features of a linear layer, `Conv1D` included."""
    return int(module.weight.shape[0] if is_transposed_linear(module) else module.in_features)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer that holds its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def experts_of(module: nn.Module) -> int:
    """A module's number of experts, or 0."""
    for name in _EXPERTS:
        if isinstance(count := getattr(module, name, None), int):
            return count
    return 0


def _routers(block: nn.Module) -> Iterator[str]:
    """Paths of the linear layers that choose or weigh experts."""
    experts = {count for module in block.modules() if (count := experts_of(module)) > 1}
    if not experts:
        return
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and module.out_features in experts | {1}:
            yield path


def _transposed(module: nn.Module, name: str, high: int, wide: int, hidden: int) -> bool:
    """Whether a stack holds its matrices as (in, out).

    Args:
        module: that the stack belongs to.
        name: the parameter's path.
        high, wide: a matrix's dimensions as they are held.
        hidden: width of the hidden states.
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    reads, writes = (wide, high), (high, wide)  # where the hidden width is in (out, in)
    if high == wide:
        return type(module).__name__ == "DbrxExpertGLU" and name.endswith("w2")
    straight, turned = writes if _WRITES.search(name) else reads
    return straight != hidden and turned == hidden


def is_rebuilt_when_quantized(model: nn.Module) -> bool:
    """Whether transformers builds other modules, with other names, for a quantized checkpoint (Llama 4's experts)."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    return not MODULES_TO_PATCH_FOR_QUANTIZATION.keys().isdisjoint(type(module).__name__ for module in model.modules())


def reads_its_weight(model: nn.Module, path: str) -> bool:
    """Whether a linear layer's weight is used otherwise than by the layer's own call.

    Then an engine that packs the weight finds none where the model looks for it. So it is with a subclass that has a
    forward pass of its own, and with a model whose code somewhere takes `layer.weight`.

    Args:
        model: of transformers.
        path: the layer's path in it.
    """
    module = model.get_submodule(path)
    if type(module).forward is not nn.Linear.forward:
        return True
    name = path.rpartition(".")[2]
    used = rf"\.{re.escape(name)}\.weight\b(?!\.(dtype|device|shape))"
    return re.search(used, _code(type(model).__module__)) is not None


@cache
def _code(module: str) -> str:
    """The code of a module of Python."""
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # made at run time: nothing to read
        return ""
