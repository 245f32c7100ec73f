"""Vector code for recurrences along rows: many rows side by side, one a lane, as LLVM IR for numba intrinsics.

A recurrence has nothing to vectorise along its own direction, so `LANES` rows are walked at once, a column at a time,
in two steps for each tile of `TILE` columns. First, eight rows at a time (contiguous in each row) are transposed in
registers, turned to contributions, and left column by column in the first-level cache. Then the recurrence reads a
column's lanes as vectors. Apart, the two run faster than as one: the transposition is limited by how much can be done
a cycle, the recurrence by how long its chain of operations takes, and four registers' worth of rows are four chains
that run side by side.

Numba's own vectoriser finds none of this (eight times slower, tried), so the loops' bodies are written here as IR on
vectors of `WIDTH` lanes, which LLVM lowers to what the processor has. No instruction carries a fast-math flag: LLVM
may neither reorder nor fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from hwpq_pipeline.kernels import jit

#: Lanes of a vector: a 256-bit register of float32. Rows side by side: four of those.
WIDTH, LANES = 8, 32

#: Columns in a step, and of a tile; a tile's make a word of keep-bits.
OCTET, TILE = 8, 32

F32, I64, I32, I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)

# llvmlite ships no types; these say what is meant.
Builder = Any
Value = Any


def vector(element: Any) -> Any:
    """The type of `WIDTH` values, one a lane."""
    return ir.VectorType(element, WIDTH)


def constant(element: Any, value: float) -> Value:
    """The same constant in every lane."""
    return ir.Constant(vector(element), [value] * WIDTH)


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
    return shuffle(builder, one, one, [0] * WIDTH)


def load_splat(builder: Builder, base: Value, at: Value) -> Value:
    """``base[at]`` in every lane."""
    return splat(builder, builder.load(builder.gep(base, [at])))


def lane_pointer(builder: Builder, base: Value, at: Value) -> Value:
    """The address of `WIDTH` float32 that start at element ``at``."""
    return builder.bitcast(builder.gep(base, [at]), vector(F32).as_pointer())


def absolute(builder: Builder, value: Value) -> Value:
    """|value|, float32 lanes, by clearing the sign bit."""
    bits = builder.and_(builder.bitcast(value, vector(I32)), constant(I32, 0x7FFFFFFF))
    return builder.bitcast(bits, vector(F32))


def copy_rows(builder: Builder, start: Value, stride: Value, target: Value) -> None:
    """Copy `TILE` columns of `WIDTH` rows, each a stretch of memory, to one after the other."""
    kind = ir.VectorType(start.type.pointee, TILE).as_pointer()
    for lane in range(WIDTH):
        row = builder.load(builder.bitcast(builder.gep(start, [builder.mul(stride, index(lane))]), kind), align=2)
        builder.store(row, builder.bitcast(builder.gep(target, [index(lane * TILE)]), kind), align=2)


def load_octet(builder: Builder, start: Value, bfloat16: bool) -> list[Value]:
    """Eight columns of ``|w|`` of eight rows, float32: eight vectors over the rows.

    Args:
        builder: where to emit.
        start: address of the first row's first column; rows are `TILE` apart.
        bfloat16: whether the weights are bfloat16's bits, else float32.
    """
    count = OCTET // 2 if bfloat16 else OCTET
    element = I32 if bfloat16 else F32  # bfloat16 are moved in pairs: half as many words to transpose
    rows = []
    for lane in range(WIDTH):
        row = builder.gep(start, [index(lane * TILE)])
        row = builder.bitcast(row, ir.VectorType(element, count).as_pointer())
        rows.append(builder.load(row, align=2 if bfloat16 else 4))
    words = _transpose(builder, rows, count)
    if not bfloat16:
        return [absolute(builder, word) for word in words]
    columns = []
    for word in words:  # the lower half of a pair is the left column (little endian)
        for bits in (builder.shl(word, constant(I32, 16)), word):
            size = builder.and_(bits, constant(I32, 0x7FFF0000))
            columns.append(builder.bitcast(size, vector(F32)))
    return columns


def _transpose(builder: Builder, rows: list[Value], count: int) -> list[Value]:
    """``count`` vectors over eight rows from eight vectors over ``count`` columns."""
    # Rows r and r + 4 are glued to one register; the rest is a 4 × 4 transposition within its halves.
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    columns = []
    for part in range(0, count, 4):
        pieces = [shuffle(builder, row, row, range(part, part + 4)) for row in rows]
        r0, r1, r2, r3 = (shuffle(builder, pieces[r], pieces[r + 4], range(WIDTH)) for r in range(4))
        for half in (low, high):
            even, odd = shuffle(builder, r0, r2, half), shuffle(builder, r1, r3, half)
            columns += [shuffle(builder, even, odd, low), shuffle(builder, even, odd, high)]
    return columns


def padded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A vector with a tile of zeros after it, so that a last, partial tile may be read whole."""
    return np.concatenate([values, np.zeros(TILE, values.dtype)])


@jit
def stage(flat, stride, block, last, first, have, tile):  # type: ignore[no-untyped-def]
    """Copy ``have`` columns of a block's rows into a tile, zeros after them. Lanes past the last row repeat it."""
    for lane in range(LANES):
        start = min(block + lane, last - 1) * stride + first
        for c in range(TILE):
            tile[lane * TILE + c] = flat[start + c] if c < have else 0
