"""The kernel against the readable version: every kind of value, odd sizes, both ways to pick an input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.kernels import jit
from hwpq_pipeline.kernels.packed_matvec import KINDS, LANES, WORD, cpu, reference

SHAPES = [(1, 4), (3, 12), (31, 36), (32, 32), (33, 100), (70, 256), (576, 1540)]


def two_of_four(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random values in two places of every four, one place at random where a value is zero."""
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2)
    values = torch.randn(rows, columns // 4, 4, generator=generator)
    values = torch.where(torch.rand(values.shape, generator=generator) < 0.1, 0.0, values)
    return torch.where(order < 2, values, 0.0).view(rows, columns)


def codes(kind: str, weight: torch.Tensor) -> torch.Tensor:
    if kind == "int8":
        return (40 * weight).round().clamp(-127, 127).to(torch.int8)
    if kind == "float8_e4m3fn":  # some of them subnormal, one in a hundred beyond the largest
        return (weight * torch.where(weight.abs() < 0.3, 0.02, 200)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight.to(getattr(torch, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(kind, shape):
    generator = torch.Generator().manual_seed(shape[0])
    weight = codes(kind, two_of_four(*shape, generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.001 + torch.rand(shape[0], 1, generator=generator)
    x = torch.randn(shape[1], generator=generator)
    got = cpu.packed_matvec(cpu.arrange(kept, positions, scale), x)
    dense = scale.double() * weight.double()
    size = (dense.abs() @ x.double().abs()).clamp_min(1e-30)
    assert got.shape == (shape[0],)
    torch.testing.assert_close(
        reference.packed_matvec(kept, positions, scale, x), dense @ x.double(), rtol=1e-9, atol=1e-9
    )
    assert float(((got - dense @ x.double()).abs() / size).max()) < 2**-23 * (2 + shape[1] / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_can_be_undone(kind):
    generator = torch.Generator().manual_seed(9)
    kept, positions = pack_two_of_four(codes(kind, two_of_four(45, 100, generator)))
    scale = 0.1 + torch.rand(45, 1, generator=generator)
    for given, back in zip((kept, positions, scale), cpu.disarrange(cpu.arrange(kept, positions, scale)), strict=True):
        assert back.dtype == given.dtype
        assert torch.equal(back.float(), given.float())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_of_groups(group):
    generator = torch.Generator().manual_seed(group)
    weight = codes("int8", two_of_four(45, 384, generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.1 + torch.rand(45, 384 // group, generator=generator)
    x = torch.randn(384, generator=generator)
    wanted = reference.packed_matvec(kept, positions, scale, x)
    got = cpu.packed_matvec(cpu.arrange(kept, positions, scale), x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_are_done_like_one(kind, monkeypatch):
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 0)  # by threads, too
    generator = torch.Generator().manual_seed(6)
    kept, positions = pack_two_of_four(codes(kind, two_of_four(300, 600, generator)))
    arranged = cpu.arrange(kept, positions, 0.1 + torch.rand(300, 1, generator=generator))
    x = torch.randn(2, 7, 600, generator=generator)[:, ::2]  # neither contiguous nor flat
    got = cpu.packed_matvec(arranged, x)
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 1 << 40)
    one_by_one = torch.stack([cpu.packed_matvec(arranged, row) for row in x.reshape(-1, 600)])
    assert torch.equal(got, one_by_one.view(2, 4, 300))


def test_both_ways_to_choose_give_the_same_sums():
    """Every processor's way is compiled here: that of the others is the portable one."""
    add = cpu.adding(permute=False)

    @jit
    def one_word(values, positions, x, sums):
        add(values, 0, positions, 0, x, 0, sums)

    generator = torch.Generator().manual_seed(5)
    kept, positions = pack_two_of_four(two_of_four(LANES, WORD, generator))
    arranged = cpu.arrange(kept, positions, torch.ones(LANES, 1))
    x = torch.randn(WORD, generator=generator)
    sums = np.zeros(LANES, np.float32)
    one_word(arranged.values.reshape(-1), arranged.positions.reshape(-1), x.numpy(), sums)
    assert np.array_equal(sums, cpu.packed_matvec(arranged, x).numpy())


def test_what_a_product_reads_is_five_bits_a_weight():
    kept, positions = pack_two_of_four(codes("int8", two_of_four(64, 1024, torch.Generator().manual_seed(0))))
    arranged = cpu.arrange(kept, positions, torch.ones(64, 1))
    assert arranged.nbytes == 64 * 1024 * 5 // 8 + 64 * 4
