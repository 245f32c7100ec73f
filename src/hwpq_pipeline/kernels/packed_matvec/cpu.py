"""The kernel: a word of 32 inputs at a time for `LANES` rows, as LLVM IR on vectors; blocks of rows in parallel."""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hwpq_pipeline.kernels import jit, over_rows
from hwpq_pipeline.kernels.packed_matvec import LANES, WORD, Arranged

F32, I64, I32, I16, I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
HAS_PERMUTE = binding.get_process_triple().startswith("x86_64") and bool(binding.get_host_cpu_features().get("avx"))
#: Kinds of values, and the dtype by which the kernel tells them apart.
_STORED = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.int16,
    "float8_e4m3fn": np.uint8,
    "int8": np.int8,
}
#: The factor that FP8's shifted bits lack, in two halves so that no product leaves float32's range.
_HALF = {"float8_e4m3fn": 2.0**60}
#: The calling thread alone does products below so many weights times inputs: to wake another thread costs a tenth of a
#: millisecond and more, in which one thread does some two million.
SMALLEST_SHARED = 1 << 23

# llvmlite ships no types; these say what is meant.
Builder = Any
Value = Any
Array = np.ndarray[Any, Any]


def arrange(kept: Tensor, positions: Tensor, scale: Tensor) -> Arranged:
    """See `packed_matvec.arrange`."""
    rows, columns = kept.shape[0], 2 * kept.shape[1]
    kind = str(kept.dtype).removeprefix("torch.")
    blocks, words = -(-rows // LANES), -(-columns // WORD)
    bits = kept.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[kept.dtype.itemsize]).numpy()
    values = np.zeros((blocks * LANES, words * WORD // 2), bits.dtype)
    values[:rows, : columns // 2] = bits
    places = np.zeros((blocks * LANES, words * 4), np.uint8)
    places[:rows, : positions.shape[1]] = positions.numpy()
    factors = np.zeros((blocks * LANES, scale.shape[1]), np.float32)
    factors[:rows] = scale.float().numpy() * np.float32(_HALF.get(kind, 1.0))
    return Arranged(
        np.ascontiguousarray(
            values.reshape(blocks, LANES, words * WORD // 4, 2).transpose(0, 2, 3, 1).view(_STORED[kind])
        ),
        np.ascontiguousarray(places.view("<u4").astype(np.uint32).reshape(blocks, LANES, words).transpose(0, 2, 1)),
        np.ascontiguousarray(factors.reshape(blocks, LANES, -1).transpose(0, 2, 1)),
        kind,
        (rows, columns),
    )


def disarrange(weight: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """See `packed_matvec.disarrange`."""
    rows, columns = weight.shape
    values = weight.values.transpose(0, 3, 1, 2).reshape(weight.values.shape[0] * LANES, -1)[:rows, : columns // 2]
    integers = {1: np.uint8, 2: np.int16, 4: np.int32}[values.itemsize]
    kept = torch.from_numpy(np.ascontiguousarray(values).view(integers)).view(getattr(torch, weight.kind))
    words = np.ascontiguousarray(weight.positions.transpose(0, 2, 1)).astype("<u4").view(np.uint8)
    positions = torch.from_numpy(words.reshape(-1, words.shape[-1])[:rows, : -(-columns // 8)].copy())
    scale = weight.scale.transpose(0, 2, 1).reshape(-1, weight.scale.shape[1])[:rows]
    return kept, positions, torch.from_numpy(scale / np.float32(_HALF.get(weight.kind, 1.0)))


def packed_matvec(weight: Arranged, x: Tensor) -> Tensor:
    """See the package's `packed_matvec`.

    A block of rows of the weight is taken to all n inputs before the next, so it comes from memory once.
    """
    blocks, words, _ = weight.positions.shape
    rows, columns = weight.shape
    given = x.detach().reshape(-1, columns).numpy()
    padded = np.zeros((given.shape[0], words * WORD), np.float32)
    np.multiply(given, np.float32(_HALF.get(weight.kind, 1.0)), out=padded[:, :columns])
    result = np.empty((given.shape[0], blocks * LANES), np.float32)
    arguments = (weight.values.reshape(-1), weight.positions.reshape(-1), weight.scale, padded, result)

    def work(first: int, last: int) -> None:
        _blocks(*arguments, words // weight.scale.shape[1], first, last)

    if given.shape[0] * rows * columns < SMALLEST_SHARED:
        work(0, blocks)
    else:
        over_rows(work, blocks, given.shape[0] * words * WORD * LANES)
    return torch.from_numpy(result[:, :rows]).view(*x.shape[:-1], rows)


@jit
def _blocks(values, positions, scale, x, result, words, first, last):  # type: ignore[no-untyped-def]
    """Blocks `first` to `last - 1` for all rows of `x`; `words` of 32 inputs share a scale."""
    sums = np.empty(LANES, np.float32)
    for block in range(first, last):
        for row in range(x.shape[0]):
            given = x[row]
            total = result[row, block * LANES : (block + 1) * LANES]
            total[:] = 0
            for group in range(scale.shape[1]):
                sums[:] = 0
                for word in range(group * words, (group + 1) * words):
                    at = (block * scale.shape[1] * words + word) * LANES
                    _add_word(values, at * (WORD // 2), positions, at, given, word * WORD, sums)
                for lane in range(LANES):
                    total[lane] += sums[lane] * scale[block, group, lane]


def _lanes(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _all(element: Any, value: int) -> Value:
    return ir.Constant(_lanes(element), [value] * LANES)


def _load(builder: Builder, base: Value, at: Value, kind: Any) -> Value:
    """A vector that begins at element `at`, wherever that lies."""
    return builder.load(builder.bitcast(builder.gep(base, [at]), kind.as_pointer()), align=1)


def _shuffle(builder: Builder, first: Value, second: Value, lanes: Any) -> Value:
    chosen = list(lanes)
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def choose(builder: Builder, quad: Value, place: Value, permute: bool) -> Value:
    """In each lane the one of four inputs that the lowest two bits of `place` name.

    Args:
        builder: where to emit.
        quad: the four inputs, one vector.
        place: int32 lanes; higher bits do not matter.
        permute: by AVX's variable permutation, else by selections.
    """
    if not permute:
        odd, late = (builder.icmp_unsigned("!=", builder.and_(place, _all(I32, bit)), _all(I32, 0)) for bit in (1, 2))
        one, two, three, four = (_shuffle(builder, quad, quad, [lane] * LANES) for lane in range(4))
        return builder.select(late, builder.select(odd, four, three), builder.select(odd, two, one))
    eight, control = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
    name = "llvm.x86.avx.vpermilvar.ps.256"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(eight, [eight, control]), name
    )
    inputs = _shuffle(builder, quad, quad, (0, 1, 2, 3, 0, 1, 2, 3))
    parts = [
        builder.call(function, [inputs, _shuffle(builder, place, place, range(lane, lane + 8))])
        for lane in range(0, LANES, 8)
    ]
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        parts = [_shuffle(builder, parts[i], parts[i + 1], range(size)) for i in range(0, len(parts), 2)]
    return parts[0]


def _widen(builder: Builder, value: Value, stored: Any) -> Value:
    """Values as float32 lanes."""
    if stored == types.float32:
        return value
    if stored == types.int16:  # float16
        return builder.fpext(builder.bitcast(value, _lanes(ir.HalfType())), _lanes(F32))
    if stored == types.uint16:  # bfloat16: float32's upper half
        bits = builder.shl(builder.zext(value, _lanes(I32)), _all(I32, 16))
        return builder.bitcast(bits, _lanes(F32))
    wide = builder.sext(value, _lanes(I32))
    if stored == types.int8:
        return builder.sitofp(wide, _lanes(F32))
    bits = builder.and_(builder.shl(wide, _all(I32, 20)), _all(I32, 0x87F00000))  # E4M3: sign, exponent, mantissa
    return builder.bitcast(bits, _lanes(F32))


def adding(permute: bool) -> Any:
    """The intrinsic that adds a word of inputs to the sums of `LANES` rows (see `choose` for `permute`)."""

    @intrinsic
    def add_word(_, values, value_at, positions, position_at, x, x_at, sums):  # type: ignore[no-untyped-def]
        stored = values.dtype
        element = {8: I8, 16: I16, 32: F32}[stored.bitwidth]

        def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
            def base(position: int) -> Value:
                return context.make_array(signature.args[position])(context, builder, args[position]).data

            words = _load(builder, base(2), args[3], _lanes(I32))
            total = _load(builder, base(6), ir.Constant(I64, 0), _lanes(F32))
            for group in range(WORD // 4):
                quad = _load(builder, base(4), builder.add(args[5], ir.Constant(I64, 4 * group)), ir.VectorType(F32, 4))
                for kept in (2 * group, 2 * group + 1):
                    place = builder.lshr(words, _all(I32, 2 * kept))
                    at = builder.add(args[1], ir.Constant(I64, kept * LANES))
                    value = _widen(builder, _load(builder, base(0), at, _lanes(element)), stored)
                    product = builder.fmul(value, choose(builder, quad, place, permute), flags=("contract",))
                    total = builder.fadd(total, product, flags=("contract",))
            builder.store(total, builder.bitcast(base(6), _lanes(F32).as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(values, types.int64, positions, types.int64, x, types.int64, sums), generate

    return add_word


_add_word = adding(HAS_PERMUTE)
