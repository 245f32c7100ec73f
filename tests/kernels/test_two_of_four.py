"""The vector kernel against sorting in Python, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.bits import pack_bits
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import two_of_four
from hwpq_pipeline.kernels.two_of_four import reference

NAN = float("nan")


def compare(weight: Tensor, column: Tensor, row: Tensor | None = None, cross: Tensor | None = None) -> None:
    row = torch.zeros(weight.shape[0]) if row is None else row
    cross = torch.zeros(weight.shape[1]) if cross is None else cross
    keep, finite = two_of_four.select_two_of_four(weight, column, row, cross)
    assert bool(finite.all())
    assert torch.equal(keep, pack_bits(reference.select_two_of_four(weight, column, row, cross)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 12), (17, 32), (3, 36), (5, 60), (16, 100), (2, 516)])
@pytest.mark.parametrize("crossed", [False, True])
def test_equal_to_the_reference(dtype: torch.dtype, rows: int, columns: int, crossed: bool) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    # Few levels, so that ties are common.
    weight = (4 * torch.randn(rows, columns, generator=generator)).round().to(dtype)
    column = torch.rand(columns, generator=generator).round() + 1
    if crossed:
        compare(weight, column, torch.rand(rows, generator=generator), torch.rand(columns, generator=generator))
    compare(weight, column)
    compare(weight + torch.randn(rows, columns, generator=generator).to(dtype), column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_read_nothing_else(dtype: torch.dtype) -> None:
    store = torch.full((9, 77), NAN, dtype=dtype)  # what is not the weight is poison
    weight = store[1:, 3:71]
    weight.copy_(torch.randn(8, 68, generator=torch.Generator().manual_seed(6)))
    compare(weight, torch.ones(68))
    compare(weight[::2], torch.ones(68))
    transposed = torch.randn(64, 12, generator=torch.Generator().manual_seed(7)).to(dtype).T
    compare(transposed, torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_equal_rows_and_subnormals(dtype: torch.dtype) -> None:
    compare(torch.zeros(3, 40, dtype=dtype), torch.ones(40))
    compare(torch.full((3, 40), -0.5, dtype=dtype), torch.ones(40))
    compare(torch.tensor([[0.0, -0.0, 0.0, -0.0]], dtype=dtype), torch.ones(4))
    tiny = (torch.randn(5, 64, generator=torch.Generator().manual_seed(8)) * 1e-39).to(dtype)
    assert bool((tiny != 0).any())
    compare(tiny, torch.ones(64))


def test_many_rows_on_several_threads() -> None:
    weight = torch.randn(700, 256, generator=torch.Generator().manual_seed(9)).bfloat16()
    compare(weight, torch.rand(256, generator=torch.Generator().manual_seed(10)))


def test_a_device_without_a_kernel_is_named() -> None:
    none = torch.zeros(4)
    with pytest.raises(HwpqError, match="no kernel for the device 'meta'"):
        two_of_four.select_two_of_four(torch.ones(4, 4, device="meta"), none, none, none)
