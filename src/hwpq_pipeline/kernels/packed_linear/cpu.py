"""The kernel: a word of 32 inputs at a time for eight rows, as LLVM IR on vectors; blocks of rows in parallel."""

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
from hwpq_pipeline.kernels.packed_linear import Packed
from hwpq_pipeline.kernels.packed_linear.layout import KEPT, ROWS, WORD

F32, I64, I32, I16, I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
HAS_PERMUTE = binding.get_process_triple().startswith("x86_64") and bool(binding.get_host_cpu_features().get("avx"))
#: The dtype that a kind's values are read in; it tells the kernel the kind. Of integers four bytes of a row are read.
_READ = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.int16,
    "float8_e4m3fn": np.uint8,
    "int8": np.int32,
    "int4": np.uint32,
}
#: The factor that FP8's shifted bits lack, and that takes back what integers at a lane's top have too much. It comes in
#: two halves, so that no product leaves float32's range.
_HALF = {"float8_e4m3fn": 2.0**60, "int8": 2.0**-12, "int4": 2.0**-14}
#: Sums of a row that do not wait for each other.
CHAINS = 4
#: The calling thread alone does products below so many weights times inputs: to wake another thread costs a tenth of a
#: millisecond and more, in which one thread does some two million.
SMALLEST_SHARED = 1 << 23

# llvmlite ships no types; these say what is meant.
Builder = Any
Value = Any
Array = np.ndarray[Any, Any]


def packed_linear(weight: Packed, x: Tensor) -> Tensor:
    """(n, out) float32 of (n, in) float32.

    A block of rows of the weight is taken to all n inputs before the next, so it comes from memory once.
    """
    blocks, words, _ = weight.places.shape
    rows, columns = weight.shape
    half = np.float32(_HALF.get(weight.kind, 1.0))
    given = x.detach().numpy()
    padded = np.zeros((given.shape[0], words * WORD), np.float32)
    np.multiply(given, half, out=padded[:, :columns])
    result = np.empty((given.shape[0], blocks * ROWS), np.float32)
    values = weight.values.numpy().reshape(-1).view(_READ[weight.kind])
    places = weight.places.numpy().reshape(-1).view(np.uint32)
    scale = weight.scale.numpy()

    def work(first: int, last: int) -> None:
        _blocks(values, places, scale, half, padded, result, words // scale.shape[1], first, last)

    if given.shape[0] * rows * columns < SMALLEST_SHARED:
        work(0, blocks)
    else:
        over_rows(work, blocks, given.shape[0] * words * WORD * ROWS)
    return torch.from_numpy(result[:, :rows])


@jit
def _blocks(values, places, scale, half, x, result, words, first, last):  # type: ignore[no-untyped-def]
    """Blocks `first` to `last - 1` for all rows of `x`; `words` of 32 inputs share a scale."""
    sums = np.empty(CHAINS * ROWS, np.float32)
    step = values.shape[0] // (places.shape[0] // ROWS)  # elements of a word
    for block in range(first, last):
        for row in range(x.shape[0]):
            given = x[row]
            total = result[row, block * ROWS : (block + 1) * ROWS]
            total[:] = 0
            for group in range(scale.shape[1]):
                sums[:] = 0
                for word in range(group * words, (group + 1) * words):
                    at = block * scale.shape[1] * words + word
                    _add_word(values, at * step, places, at * ROWS, given, word * WORD, sums)
                for lane in range(ROWS):
                    both = (sums[lane] + sums[ROWS + lane]) + (sums[2 * ROWS + lane] + sums[3 * ROWS + lane])
                    total[lane] += both * (scale[block, group, lane] * half)


def _lanes(element: Any) -> Any:
    return ir.VectorType(element, ROWS)


def _all(element: Any, value: int) -> Value:
    return ir.Constant(_lanes(element), [value] * ROWS)


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
        one, two, three, four = (_shuffle(builder, quad, quad, [lane] * ROWS) for lane in range(4))
        return builder.select(late, builder.select(odd, four, three), builder.select(odd, two, one))
    name = "llvm.x86.avx.vpermilvar.ps.256"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_lanes(F32), [_lanes(F32), _lanes(I32)]), name
    )
    return builder.call(function, [_shuffle(builder, quad, quad, (0, 1, 2, 3, 0, 1, 2, 3)), place])


def _float(builder: Builder, value: Value, stored: Any) -> Value:
    """Values of floats as float32 lanes."""
    if stored == types.float32:
        return value
    if stored == types.int16:  # float16
        return builder.fpext(builder.bitcast(value, _lanes(ir.HalfType())), _lanes(F32))
    if stored == types.uint16:  # bfloat16: float32's upper half
        bits = builder.shl(builder.zext(value, _lanes(I32)), _all(I32, 16))
        return builder.bitcast(bits, _lanes(F32))
    wide = builder.sext(value, _lanes(I32))
    bits = builder.and_(builder.shl(wide, _all(I32, 20)), _all(I32, 0x87F00000))  # E4M3: sign, exponent, mantissa
    return builder.bitcast(bits, _lanes(F32))


def _integer(builder: Builder, vectors: list[Value], kept: int, nibbles: bool) -> Value:
    """A kept value of integers as float32 lanes, times 2²⁴ (bytes) or 2²⁸ (half bytes): moved to a lane's top.

    Two instructions, a shift and a mask, take the place of two shifts, or of a shift, a mask and a subtraction.
    """
    part, byte = divmod(kept, 4)
    width, vector = (4, vectors[part // 2]) if nibbles else (8, vectors[part])
    at = 8 * byte + (4 * (part % 2) if nibbles else 0)
    shifted = builder.shl(vector, _all(I32, 32 - width - at))
    masked = builder.and_(shifted, _all(I32, -(1 << (32 - width))))
    return builder.sitofp(masked, _lanes(F32))


def adding(permute: bool) -> Any:
    """The intrinsic that adds a word of inputs to the sums of eight rows (see `choose` for `permute`)."""

    @intrinsic
    def add_word(_, values, value_at, places, place_at, x, x_at, sums):  # type: ignore[no-untyped-def]
        stored = values.dtype
        integers, nibbles = stored in (types.int32, types.uint32), stored == types.uint32
        element = F32 if stored == types.float32 else {8: I8, 16: I16, 32: I32}[stored.bitwidth]

        def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Any:
            def base(position: int) -> Value:
                return context.make_array(signature.args[position])(context, builder, args[position]).data

            def at(start: Value, offset: int) -> Value:
                return builder.add(start, ir.Constant(I64, offset))

            places = _load(builder, base(2), args[3], _lanes(I32))
            vectors = 2 if nibbles else 4
            read = [_load(builder, base(0), at(args[1], n * ROWS), _lanes(I32)) for n in range(vectors * integers)]
            if nibbles:  # codes plus 8 to two's complement
                read = [builder.xor(vector, _all(I32, -0x77777778)) for vector in read]
            totals = [_load(builder, base(6), ir.Constant(I64, n * ROWS), _lanes(F32)) for n in range(CHAINS)]
            for kept in range(KEPT):
                quad = _load(builder, base(4), at(args[5], 4 * (kept // 2)), ir.VectorType(F32, 4))
                if integers:  # the place of value 4k + j is at bits 2k of byte j
                    value, bit = _integer(builder, read, kept, nibbles), 8 * (kept % 4) + 2 * (kept // 4)
                else:
                    value = _float(builder, _load(builder, base(0), at(args[1], kept * ROWS), _lanes(element)), stored)
                    bit = 2 * kept
                place = builder.lshr(places, _all(I32, bit))
                product = builder.fmul(value, choose(builder, quad, place, permute), flags=("contract",))
                totals[kept % CHAINS] = builder.fadd(totals[kept % CHAINS], product, flags=("contract",))
            for n, total in enumerate(totals):
                pointer = builder.gep(base(6), [ir.Constant(I64, n * ROWS)])
                builder.store(total, builder.bitcast(pointer, _lanes(F32).as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(values, types.int64, places, types.int64, x, types.int64, sums), generate

    return add_word


_add_word = adding(HAS_PERMUTE)
