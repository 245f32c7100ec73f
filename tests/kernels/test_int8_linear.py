"""A dense layer in INT8 codes against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.kernels.int8_linear import int8_linear, int8_rows


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 1, 576), (0, 64), (5, 100)])
def test_product_and_rows_are_the_formula(dtype, scale_dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16().to(dtype)
    codes = torch.randint(-127, 128, (260, shape[-1]), dtype=torch.int8, generator=generator)
    scale = (0.001 + torch.rand(260, generator=generator)).to(scale_dtype)
    exact = x.double() @ (codes.double() * scale.double()[:, None]).T
    got = int8_linear(x, codes, scale)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 260)
    if exact.numel():
        assert float((got.double() - exact).abs().max()) < 2**-7 * float(exact.abs().max())
    ids = torch.tensor([[3, 0], [259, 3]])
    rows = int8_rows(ids, codes, scale, dtype)
    torch.testing.assert_close(rows.double(), codes[ids].double() * scale[ids].double()[..., None], rtol=2**-8, atol=0)
    assert rows.dtype == dtype
