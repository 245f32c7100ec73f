"""Vector code for recurrences along rows: sixteen rows side by side, one a lane, as LLVM IR for numba intrinsics.

A recurrence has nothing to vectorise along its own direction, so the kernels run `LANES` rows at once, a column at a
time. Eight columns of the rows are loaded (contiguous in each row) and transposed in registers. Numba's own vectoriser
does not find this: its code was five times slower. So the inner loop's body is written here as IR on vectors of `LANES`
values, which LLVM lowers to the registers that the processor has (two of AVX2, one of AVX-512, four of NEON). No
instruction here carries a fast-math flag: LLVM may neither reorder nor fuse.
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hwpq_pipeline.kernels import jit

#: Rows side by side; columns in a step; columns of a tile, which make a word of keep-bits.
LANES, OCTET, TILE = 16, 8, 32

#: How many columns ahead of its use a row is asked for: sixteen rows are more streams than processors foresee well.
AHEAD = 3 * TILE

F32, I64, I32, I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)

# llvmlite ships no types; these names stand for them.
Builder = Any
Value = Any


def vector(element: Any) -> Any:
    """The type of one value a lane."""
    return ir.VectorType(element, LANES)


def constant(element: Any, value: float) -> Value:
    """The same constant in every lane."""
    return ir.Constant(vector(element), [value] * LANES)


def lane_number(value: int) -> Value:
    """As `extract_element` takes it."""
    return ir.Constant(I32, value)


def index(value: int) -> Value:
    """As `gep` takes it."""
    return ir.Constant(I64, value)


def pointer(context: Any, builder: Builder, array_type: Any, array: Value) -> Value:
    """The address of an array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def shuffle(builder: Builder, first: Value, second: Value, lanes: Sequence[int]) -> Value:
    """A vector of the named lanes of two, the second's counted on from the first's."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder: Builder, scalar: Value) -> Value:
    """The same value in every lane."""
    one = builder.insert_element(ir.Constant(vector(scalar.type), ir.Undefined), scalar, ir.Constant(I32, 0))
    return shuffle(builder, one, one, [0] * LANES)


def load_splat(builder: Builder, base: Value, at: Value) -> Value:
    """`base[at]` in every lane."""
    return splat(builder, builder.load(builder.gep(base, [at])))


def lane_pointer(builder: Builder, base: Value, at: Value) -> Value:
    """The address of `LANES` float32 that start at element `at`."""
    return builder.bitcast(builder.gep(base, [at]), vector(F32).as_pointer())


def absolute(builder: Builder, value: Value) -> Value:
    """|value|, float32 lanes, by clearing the sign bit."""
    bits = builder.and_(builder.bitcast(value, vector(I32)), constant(I32, 0x7FFFFFFF))
    return builder.bitcast(bits, vector(F32))


def population(builder: Builder, words: Value) -> Value:
    """The number of ones in each lane's 32-bit word."""
    kind = vector(I32)
    name = f"llvm.ctpop.v{LANES}i32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(kind, [kind]), name)
    return builder.call(function, [words])


def load_octet(builder: Builder, tile: Value, first: Value, bfloat16: bool) -> list[Value]:
    """Eight columns of `|w|` from a staged tile, float32, each a vector over the rows.

    Args:
        builder: where to emit.
        tile: address of `LANES` rows of `TILE` weights, one row after the other.
        first: the octet's first column in the tile.
        bfloat16: whether the weights are bfloat16's bits, else float32.
    """
    width = OCTET // 2 if bfloat16 else OCTET
    element = I32 if bfloat16 else F32  # bfloat16 are moved in pairs: half as many words to transpose
    start, loaded = builder.gep(tile, [first]), []
    for lane in range(LANES):
        row = builder.bitcast(builder.gep(start, [index(lane * TILE)]), ir.VectorType(element, width).as_pointer())
        loaded.append(builder.load(row, align=2 if bfloat16 else 4))
    words = _transpose(builder, loaded, width)
    if not bfloat16:
        return [absolute(builder, word) for word in words]
    columns = []
    for word in words:  # the lower half of a pair is the left column (little endian)
        for bits in (builder.shl(word, constant(I32, 16)), word):
            size = builder.and_(bits, constant(I32, 0x7FFF0000))
            columns.append(builder.bitcast(size, vector(F32)))
    return columns


def _transpose(builder: Builder, rows: list[Value], width: int) -> list[Value]:
    """`width` vectors over `LANES` rows from `LANES` vectors over `width` columns."""
    # Glue rows r, r + 4, r + 8, … to one long vector, so that the rest is a 4 × 4 transposition within 128-bit lanes.
    quads = []
    for part in range(0, width, 4):
        glued = []
        for r in range(4):
            pieces = [shuffle(builder, rows[i], rows[i], range(part, part + 4)) for i in range(r, LANES, 4)]
            while len(pieces) > 1:
                size = 2 * pieces[0].type.count
                pieces = [shuffle(builder, pieces[i], pieces[i + 1], range(size)) for i in range(0, len(pieces), 2)]
            glued.append(pieces[0])
        quads.append(glued)
    low = [i for block in range(0, LANES, 4) for i in (block, block + LANES, block + 1, block + LANES + 1)]
    high = [i + 2 for i in low]
    columns = []
    for r0, r1, r2, r3 in quads:
        even, odd = (shuffle(builder, r0, r2, low), shuffle(builder, r1, r3, low))
        columns += [shuffle(builder, even, odd, low), shuffle(builder, even, odd, high)]
        even, odd = (shuffle(builder, r0, r2, high), shuffle(builder, r1, r3, high))
        columns += [shuffle(builder, even, odd, low), shuffle(builder, even, odd, high)]
    return columns


def padded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A vector with an octet of zeros after it, so that a last, partial octet may be read whole."""
    return np.concatenate([values, np.zeros(OCTET, values.dtype)])


def _prefetch(module: Any) -> Value:
    """LLVM's prefetch: an address (any; it cannot fault), for reading, to keep in all caches, of data."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    return module.globals.get("llvm.prefetch.p0") or ir.Function(module, kind, "llvm.prefetch.p0")


@intrinsic
def _copy_row(_, flat, start, tile, lane):  # type: ignore[no-untyped-def]
    """`TILE` weights to a lane's place in the tile, as vectors, and ask memory for those that come `AHEAD` of them."""

    def generate(context: Any, builder: Builder, _signature: Any, values: Any) -> Any:
        source = builder.gep(pointer(context, builder, flat, values[0]), [values[1]])
        target = pointer(context, builder, tile, values[2])
        target = builder.gep(target, [builder.mul(values[3], index(TILE))])
        for line in range(0, TILE, 512 // flat.dtype.bitwidth):
            ahead = builder.bitcast(builder.gep(source, [index(AHEAD + line)]), I8.as_pointer())
            builder.call(_prefetch(builder.module), [ahead, *(ir.Constant(I32, flag) for flag in (0, 3, 1))])
        kind = ir.VectorType(source.type.pointee, TILE).as_pointer()
        row = builder.load(builder.bitcast(source, kind), align=flat.dtype.bitwidth // 8)
        builder.store(row, builder.bitcast(target, kind), align=flat.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(flat, types.int64, tile, types.int64), generate


@jit
def stage(flat, stride, block, last, first, have, tile):  # type: ignore[no-untyped-def]
    """Copy `have` columns of a block's rows into a tile, zeros after them.

    Rows are often a multiple of 4 KiB apart, so that all sixteen want the same few places in the first-level cache:
    each of their cache lines is therefore read once, whole. Lanes past the last row repeat it.
    """
    for lane in range(LANES):
        start = min(block + lane, last - 1) * stride + first
        if have == TILE:
            _copy_row(flat, start, tile, lane)
        else:
            for c in range(TILE):
                tile[lane * TILE + c] = flat[start + c] if c < have else 0
