"""Packed 2:4 weights against loops over groups of four."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.compression.packing import pack_two_of_four, unpack_two_of_four
from hwpq_pipeline.errors import HwpqError
from tests.kernels.packed import codes, two_of_four

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (7, 64)])
def test_bytes_are_those_of_a_loop(dtype, shape):
    rows, columns = shape
    weight = codes(dtype, two_of_four(rows, columns, torch.Generator().manual_seed(1)))
    kept, positions = pack_two_of_four(weight)
    assert kept.dtype == weight.dtype
    assert kept.shape == (shape[0], shape[1] // 2)
    assert positions.shape == (shape[0], -(-shape[1] // 8))
    for row in range(shape[0]):
        bits = 0
        for group in range(shape[1] // 4):
            four = weight[row, 4 * group : 4 * group + 4].float()
            chosen = [c for c in range(4) if four[c] != 0]
            chosen = sorted((chosen + [c for c in range(4) if c not in chosen])[:2])
            assert kept[row, 2 * group : 2 * group + 2].float().tolist() == [four[c] for c in chosen]
            bits |= (chosen[0] | chosen[1] << 2) << 4 * group
        assert bytes(positions[row].tolist()) == bits.to_bytes(positions.shape[1], "little")


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_the_weight_back(dtype):
    weight = codes(dtype, two_of_four(9, 44, torch.Generator().manual_seed(2)))
    again = unpack_two_of_four(*pack_two_of_four(weight))
    assert again.dtype == weight.dtype
    assert torch.equal(again.float(), weight.float())


def test_a_weight_that_is_not_two_of_four_is_refused():
    with pytest.raises(HwpqError, match=r"layer 3: 1 groups of four are not 2:4, the first in row 1, columns 4 to 7"):
        pack_two_of_four(torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 1, 1]]), where="layer 3")


@pytest.mark.parametrize("damage", ["a column twice", "another width", "another dtype"])
def test_damaged_positions_are_refused(damage):
    kept, positions = pack_two_of_four(two_of_four(4, 16, torch.Generator().manual_seed(3)))
    wrong = {"a column twice": positions.clone().fill_(0x5A), "another width": positions[:, :1],
             "another dtype": positions.to(torch.int8)}[damage]  # fmt: skip
    with pytest.raises(HwpqError, match="damaged"):
        unpack_two_of_four(kept, wrong)
