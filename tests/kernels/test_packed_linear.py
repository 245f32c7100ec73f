"""The kernels against the readable version: every kind of value, odd sizes, few and many inputs, both kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import jit
from hwpq_pipeline.kernels import packed_linear as door
from hwpq_pipeline.kernels.packed_linear import (
    KINDS,
    KINDS_OF_INTEGERS,
    ROWS,
    WORD,
    Kernel,
    Packed,
    arrange,
    cpu,
    disarrange,
    native,
    packed_linear,
    reference,
    unpack,
)
from tests.kernels.packed import codes, needs_compiler, two_of_four

SHAPES = [(1, 4), (3, 12), (31, 36), (8, 32), (33, 100), (70, 256), (576, 1540)]


@pytest.fixture(params=["numba", pytest.param("native", marks=needs_compiler)])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each of the kernels in turn."""
    found: Kernel = request.param
    return found


def made(kind: str, rows: int, columns: int, groups: int = 1, seed: int = 0) -> tuple[Packed, Tensor]:
    """A packed weight, and the dense one in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = codes(kind, two_of_four(rows, columns, generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.001 + torch.rand(rows, groups, generator=generator)
    dense = weight.double() * scale.double().repeat_interleave(columns // groups, 1)
    return arrange(kept, positions, scale, four_bits=kind == "int4"), dense


def rounded(x: Tensor) -> Tensor:
    """What the native kernel makes of the inputs of integers: INT8 with a scale for each word, float64."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    found = (padded / scale.clamp_min(1e-30)).round() * scale.double()
    return found.flatten(-2)[..., : x.shape[-1]]


def test_small_inputs_of_8_bit_floats_are_not_lost(kernel: Kernel) -> None:
    """Their bits stand for numbers times 2⁻¹²⁰ in the kernels."""
    weight, dense = made("float8_e4m3fn", 16, 64)
    x = 1e-12 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    wanted = x.double() @ dense.T
    got = packed_linear(weight, x, kernel=kernel).double()
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_inputs_of_another_width_are_refused(kernel: Kernel) -> None:
    weight, _ = made("int8", 16, 64)
    for width in (32, 60, 68, 96):
        with pytest.raises(HwpqError, match=f"{width} inputs instead of 64"):
            packed_linear(weight, torch.ones(1, width), kernel=kernel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_kernel_is_the_formula(kernel: Kernel, kind: str, shape: tuple[int, int], count: int) -> None:
    weight, dense = made(kind, *shape, seed=shape[0])
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1))
    got = packed_linear(weight, x, kernel=kernel)
    given = rounded(x) if kernel == "native" and kind in KINDS_OF_INTEGERS else x.double()
    size = (x.double().abs() @ dense.abs().T).clamp_min(1e-30)
    assert got.shape == (count, shape[0])
    miss = ((got - given @ dense.T).abs() / size).max()
    # A code of INT8 may be the other neighbour where float32 and float64 round differently.
    assert float(miss) < 2**-23 * (4 + shape[1] / 8) + (1e-3 if kernel == "native" and kind in KINDS_OF_INTEGERS else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_formula(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = codes(kind, two_of_four(33, 100, generator))
    kept, positions = pack_two_of_four(weight)
    scale, x = 0.001 + torch.rand(33, 1, generator=generator), torch.randn(100, generator=generator)
    expected = scale[:, 0].double() * (weight.double() @ x.double())
    torch.testing.assert_close(reference.packed_linear(kept, positions, scale, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(45, 100), (8, 32), (3, 36)])
def test_the_layout_can_be_undone(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(9)
    weight = codes(kind, two_of_four(*shape, generator))
    kept, positions = pack_two_of_four(weight)
    scale = 0.1 + torch.rand(shape[0], 1, generator=generator)
    arranged = arrange(kept, positions, scale, four_bits=kind == "int4")
    for given, back in zip((kept, positions, scale), disarrange(arranged), strict=True):
        assert back.dtype == given.dtype
        assert torch.equal(back.float(), given.float())
    assert torch.equal(unpack(arranged), weight.float() * scale)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(45, 100), (3, 36)])
def test_native_unpacks_as_python_does(kind: str, shape: tuple[int, int]) -> None:
    native.build()
    weight, _ = made(kind, *shape)
    arguments = (weight.values, weight.places, weight.scale, KINDS.index(kind), *shape)
    torch.testing.assert_close(torch.ops.hwpq_native.unpack(*arguments), unpack(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_of_groups(kernel: Kernel, kind: str, group: int) -> None:
    weight, dense = made(kind, 45, 384, 384 // group)
    x = torch.randn(2, 384, generator=torch.Generator().manual_seed(group))
    wanted = x.double() @ dense.T
    got = packed_linear(weight, x, kernel=kernel).double()
    loose = kernel == "native" and kind in KINDS_OF_INTEGERS  # inputs in INT8
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=(2e-2 if loose else 1e-4) * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_are_done_like_one(kernel: Kernel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 0)  # by threads, too
    weight, _ = made(kind, 300, 600)
    x = torch.randn(2, 7, 600, generator=torch.Generator().manual_seed(6))[:, ::2]  # neither contiguous nor flat
    got = packed_linear(weight, x, kernel=kernel)
    monkeypatch.setattr(cpu, "SMALLEST_SHARED", 1 << 40)
    one_by_one = torch.stack([packed_linear(weight, row, kernel=kernel) for row in x.reshape(-1, 600)])
    assert torch.equal(got, one_by_one.view(2, 4, 300))


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt(kernel: Kernel, kind: str, dtype: torch.dtype) -> None:
    """It is multiplied by the unpacked weight, or where that is faster by the kernel, whose inputs are INT8 then."""
    weight, dense = made(kind, 40, 64)
    bias = torch.randn(40)
    x = torch.randn(3, door.FEW, 64, dtype=dtype)
    rounds = kernel == "native" and kind in KINDS_OF_INTEGERS
    wanted = (rounded(x.float()) if rounds else x.double()) @ dense.T + bias.double()
    got = packed_linear(weight, x, bias, kernel=kernel)
    assert got.dtype == dtype
    coarse = 2e-2 if dtype == torch.bfloat16 else 1e-3 if rounds else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=coarse, atol=coarse * float(wanted.abs().max()))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_multiplies_by_the_unpacked_weight_when_it_is_told_to(kind: str, dtype: torch.dtype) -> None:
    native.build()
    weight, dense = made(kind, 40, 100)
    x, bias = torch.randn(3, 5, 100, dtype=dtype), torch.randn(40)
    parts = (weight.values, weight.places, weight.scale, bias, KINDS.index(kind), 40)
    got = torch.ops.hwpq_native.packed_linear(x, *parts, few=0)
    wanted = x.double() @ dense.T + bias.double()
    coarse = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=coarse, atol=coarse * float(wanted.abs().max()))


def test_bias_dtype_and_nothing_at_all(kernel: Kernel) -> None:
    weight, dense = made("bfloat16", 20, 64)
    bias, x = torch.randn(20), torch.randn(2, 64)
    got = packed_linear(weight, x.bfloat16(), bias, kernel=kernel)
    assert got.dtype == torch.bfloat16
    wanted = x.bfloat16().double() @ dense.T + bias.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-2)
    assert packed_linear(weight, x[:0], kernel=kernel).shape == (0, 20)


def test_an_input_that_is_no_number_is_none_afterwards(kernel: Kernel) -> None:
    for kind in KINDS:
        weight, _ = made(kind, 16, 64)
        x = torch.ones(1, 64)
        x[0, 5] = float("nan")
        assert bool(packed_linear(weight, x, kernel=kernel).isnan().any()), kind


def test_the_op_is_traced_and_compiled(kernel: Kernel) -> None:
    """By its fake implementation; opcheck compares schema, fake and real result."""
    weight, _ = made("int8", 40, 64)
    x = torch.randn(3, 64)
    name = torch.ops.hwpq_native.packed_linear if kernel == "native" else torch.ops.hwpq.packed_linear
    arguments = (x, weight.values, weight.places, weight.scale, torch.randn(40), KINDS.index("int8"), 40)
    torch.library.opcheck(name.default, arguments, test_utils=("test_schema", "test_faketensor"))
    wanted = packed_linear(weight, x, kernel=kernel) * 2
    traced = torch.compile(
        lambda given: packed_linear(weight, given, kernel=kernel) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(traced(x), wanted)


def test_both_ways_to_choose_give_the_same_sums() -> None:
    """Every processor's way is compiled here: that of the others is the portable one."""
    add = cpu.adding(permute=False)

    @jit
    def one_word(values: Any, places: Any, x: Any, sums: Any) -> None:
        add(values, 0, places, 0, x, 0, sums)

    weight, _ = made("float32", ROWS, WORD)
    arranged = Packed(weight.values, weight.places, torch.ones_like(weight.scale), "float32", weight.shape)
    x = torch.randn(WORD, generator=torch.Generator().manual_seed(5))
    sums = np.zeros(cpu.CHAINS * ROWS, np.float32)
    values, places = arranged.values.numpy().reshape(-1).view(np.float32), arranged.places.numpy().reshape(-1)
    one_word(values, places.view(np.uint32), x.numpy(), sums)
    chains = sums.reshape(cpu.CHAINS, ROWS)
    assert np.array_equal((chains[0] + chains[1]) + (chains[2] + chains[3]), cpu.packed_linear(arranged, x[None])[0])


@pytest.mark.parametrize(("kind", "bits"), [("int8", 5), ("int4", 3), ("bfloat16", 9)])
def test_what_a_product_reads(kind: str, bits: int) -> None:
    weight, _ = made(kind, 64, 1024)
    assert weight.nbytes == 64 * 1024 * bits // 8 + 64 * 4


def test_a_device_without_a_kernel_is_named() -> None:
    kept, positions = pack_two_of_four(two_of_four(4, 32, torch.Generator().manual_seed(0)))
    with pytest.raises(HwpqError, match="packed_linear: there is no kernel for the device 'meta'"):
        arrange(kept.to("meta"), positions, torch.ones(4, 1))
