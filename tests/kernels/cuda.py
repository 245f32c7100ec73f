"""What the tests of the CUDA kernels share: a device, and numbers on it."""

from __future__ import annotations

from typing import TypeVarTuple, cast

import torch
from torch import Tensor

Tensors = TypeVarTuple("Tensors")

NAN = float("nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rows: int, columns: int, crossed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    column = random(columns, seed=1).abs() + 0.5
    if not crossed:
        return column, torch.zeros(rows), torch.zeros(columns)
    return column, random(rows, seed=2).abs(), random(columns, seed=3).abs()


def there(*tensors: *Tensors) -> tuple[*Tensors]:
    """The tensors on the device."""
    return tuple(tensor.to(DEVICE) for tensor in cast("tuple[Tensor, ...]", tensors))  # type: ignore[return-value]
