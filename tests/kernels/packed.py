"""Random 2:4 weights for the tests of packing, of its kernel and of the packed export."""

from __future__ import annotations

import shutil

import pytest
import torch

#: The native kernel is an option; a machine without a compiler does without it.
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="the native kernel needs g++ and ninja"
)


def two_of_four(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random values in two places of every four, one place at random where a value is zero."""
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2)
    values = torch.randn(rows, columns // 4, 4, generator=generator)
    values = torch.where(torch.rand(values.shape, generator=generator) < 0.1, 0.0, values)
    return torch.where(order < 2, values, 0.0).view(rows, columns)


def codes(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the packed formats store it: a name in `packed_linear.KINDS`."""
    if kind == "int4":
        return (3 * weight).round().clamp(-8, 7).to(torch.int8)
    if kind == "int8":
        return (40 * weight).round().clamp(-127, 127).to(torch.int8)
    if kind == "float8_e4m3fn":  # some of them subnormal, one in a hundred beyond the largest
        return (weight * torch.where(weight.abs() < 0.3, 0.02, 200)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight.to(getattr(torch, kind))
