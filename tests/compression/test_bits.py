"""Packing against bits set by hand, and against numpy's own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwpq_pipeline.compression.bits import pack_bits, packed_columns, unpack_bits
from hwpq_pipeline.errors import HwpqError


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 33])
def test_bit_k_of_byte_b_is_column_8b_plus_k(columns: int) -> None:
    keep = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack_bits(keep)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, packed_columns(columns)) == (5, -(-columns // 8))
    for i in range(5):
        expected = [0] * packed.shape[1]
        for j in range(columns):
            expected[j // 8] |= int(keep[i, j]) << (j % 8)
        assert packed[i].tolist() == expected
    assert torch.equal(unpack_bits(packed, columns), keep)
    assert np.array_equal(np.packbits(keep.numpy(), axis=1, bitorder="little"), packed.numpy())


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(HwpqError, match="cannot be packed"):
        pack_bits(torch.ones(2, 3))
    with pytest.raises(HwpqError, match="do not hold 17 columns"):
        unpack_bits(torch.zeros(2, 2, dtype=torch.uint8), 17)
