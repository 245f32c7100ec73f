"""The kernel against the readable version: every kind of value, odd sizes, both ways to pick an input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import jit
from hwpq_pipeline.kernels.packed_matvec import (
    KINDS,
    LANES,
    WORD,
    arrange,
    cpu,
    disarrange,
    packed_matvec,
    reference,
)
from tests.kernels.packed import codes, two_of_four

SHAPES = [(1, 4), (3, 12), (31, 36), (32, 32), (33, 100), (70, 256), (576, 1540)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = codes(kind, two_of_four(shape[0], shape[1], generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.001 + torch.rand(shape[0], 1, generator=generator)
    x = torch.randn(shape[1], generator=generator)
    got = packed_matvec(arrange(kept, positions, scale), x)
    dense = scale.double() * weight.double()
    size = (dense.abs() @ x.double().abs()).clamp_min(1e-30)
    assert got.shape == (shape[0],)
    torch.testing.assert_close(
        reference.packed_matvec(kept, positions, scale, x), dense @ x.double(), rtol=1e-9, atol=1e-9
    )
    assert float(((got - dense @ x.double()).abs() / size).max()) < 2**-23 * (2 + shape[1] / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_can_be_undone(kind: str) -> None:
    generator = torch.Generator().manual_seed(9)
    kept, positions = pack_two_of_four(codes(kind, two_of_four(45, 100, generator)))
    scale = 0.1 + torch.rand(45, 1, generator=generator)
    for given, back in zip((kept, positions, scale), disarrange(arrange(kept, positions, scale)), strict=True):
        assert back.dtype == given.dtype
        assert torch.equal(back.float(), given.float())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_of_groups(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    weight = codes("int8", two_of_four(45, 384, generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.1 + torch.rand(45, 384 // group, generator=generator)
    x = torch.randn(384, generator=generator)
    wanted = reference.packed_matvec(kept, positions, scale, x)
    got = packed_matvec(arrange(kept, positions, scale), x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_are_done_like_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 0)  # by threads, too
    generator = torch.Generator().manual_seed(6)
    kept, positions = pack_two_of_four(codes(kind, two_of_four(300, 600, generator)))
    arranged = arrange(kept, positions, 0.1 + torch.rand(300, 1, generator=generator))
    x = torch.randn(2, 7, 600, generator=generator)[:, ::2]  # neither contiguous nor flat
    got = packed_matvec(arranged, x)
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 1 << 40)
    one_by_one = torch.stack([packed_matvec(arranged, row) for row in x.reshape(-1, 600)])
    assert torch.equal(got, one_by_one.view(2, 4, 300))


def test_both_ways_to_choose_give_the_same_sums() -> None:
    """Every processor's way is compiled here: that of the others is the portable one."""
    add = cpu.adding(permute=False)

    @jit
    def one_word(values: Any, positions: Any, x: Any, sums: Any) -> None:
        add(values, 0, positions, 0, x, 0, sums)

    generator = torch.Generator().manual_seed(5)
    kept, positions = pack_two_of_four(two_of_four(LANES, WORD, generator))
    arranged = arrange(kept, positions, torch.ones(LANES, 1))
    x = torch.randn(WORD, generator=generator)
    sums = np.zeros(LANES, np.float32)
    one_word(arranged.values.reshape(-1), arranged.positions.reshape(-1), x.numpy(), sums)
    assert np.array_equal(sums, packed_matvec(arranged, x).numpy())


def test_what_a_product_reads_is_five_bits_a_weight() -> None:
    kept, positions = pack_two_of_four(codes("int8", two_of_four(64, 1024, torch.Generator().manual_seed(0))))
    arranged = arrange(kept, positions, torch.ones(64, 1))
    assert arranged.nbytes == 64 * 1024 * 5 // 8 + 64 * 4


def test_a_device_without_a_kernel_is_named() -> None:
    kept, positions = pack_two_of_four(two_of_four(4, 32, torch.Generator().manual_seed(0)))
    with pytest.raises(HwpqError, match="packed_matvec: there is no kernel for the device 'meta'"):
        arrange(kept.to("meta"), positions, torch.ones(4, 1))
    with pytest.raises(HwpqError, match="no kernel for the device 'meta'"):
        packed_matvec(arrange(kept, positions, torch.ones(4, 1)), torch.ones(32, device="meta"))
