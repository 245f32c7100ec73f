"""The CPU kernel: 32 columns of a row a step, the four members of eight groups in four vectors, a word of the mask.

Six comparisons of vectors settle eight groups. The inputs' factors are laid out beforehand by their place in the group
(all first members, all second, …), so that only the weights are shuffled. It is written as LLVM IR, for the reason that
`kernels.lanes` gives. None of it carries a fast-math flag.
"""

# ruff: noqa: ARG001 (the intrinsics' arguments are there for their types; their code takes the values by position)

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hwpq_pipeline.kernels import flat_rows, jit, over_rows
from hwpq_pipeline.kernels.lanes import F32, I32, index, pointer, shuffle

Array = np.ndarray[Any, Any]

#: Groups settled at once, and the columns they make: a 32-bit word of the mask.
GROUPS, WORD = 8, 32

_LANES = ir.VectorType(I32, GROUPS)
_FLOATS = ir.VectorType(F32, GROUPS)
_BITS = ir.VectorType(ir.IntType(1), GROUPS)

#: The bits of +infinity: a float32 whose bits without sign are as large is not finite.
INFINITY = 0x7F800000


def _lanes(value: int) -> Any:
    return ir.Constant(_LANES, [value] * GROUPS)


def _members(b: Any, start: Any, bfloat16: bool) -> list[Any]:
    """|w| of the groups' first, second, third and fourth members, float32."""
    count = WORD // 2 if bfloat16 else WORD
    words = b.bitcast(start, ir.VectorType(I32, count).as_pointer())
    words = b.load(words, align=2 if bfloat16 else 4)
    members = []
    for place in range(4):
        if bfloat16:  # two columns a word, the left one in the lower half
            part = shuffle(b, words, words, range(place // 2, count, 2))
            part = b.and_(part if place % 2 else b.shl(part, _lanes(16)), _lanes(0x7FFF0000))
        else:
            part = b.and_(shuffle(b, words, words, range(place, count, 4)), _lanes(0x7FFFFFFF))
        members.append(b.bitcast(part, _FLOATS))
    return members


def _settle(b: Any, members: list[Any]) -> list[Any]:
    """Whether each member wins two of its three games; of equals the earlier member wins."""
    won: list[list[Any]] = [[], [], [], []]
    for i in range(4):
        for j in range(i + 1, 4):
            first = b.fcmp_ordered(">=", members[i], members[j])
            won[i].append(first)
            won[j].append(b.xor(first, ir.Constant(_BITS, [1] * GROUPS)))
    return [b.or_(b.and_(x, b.or_(y, z)), b.and_(y, z)) for x, y, z in won]


def _pack(b: Any, kept: list[Any]) -> Any:
    """A 32-bit word: four bits a group, the first group lowest."""
    nibbles = _lanes(0)
    for place, keep in enumerate(kept):
        nibbles = b.or_(nibbles, b.select(keep, _lanes(1 << place), _lanes(0)))
    word = b.shl(nibbles, ir.Constant(_LANES, list(range(0, WORD, 4))))
    lanes = GROUPS
    while lanes > 1:
        lanes //= 2
        word = b.or_(shuffle(b, word, word, range(lanes)), shuffle(b, word, word, range(lanes, 2 * lanes)))
    return b.extract_element(word, ir.Constant(I32, 0))


@intrinsic
def _word(_, flat, start, column, cross, row, groups, group, largest, keep, place):  # type: ignore[no-untyped-def]
    """Settle `WORD` columns from `flat[start]`, write their word at byte `place`, track the largest bits."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        flat_at, column_at, largest_at, keep_at = (
            pointer(context, b, signature.args[i], values[i]) for i in (0, 2, 7, 8)
        )

        def factors(base: Any, member: int) -> Any:
            at = b.add(b.mul(values[5], index(member)), values[6])
            return b.load(b.bitcast(b.gep(base, [at]), _FLOATS.as_pointer()), align=4)

        members = _members(b, b.gep(flat_at, [values[1]]), flat.dtype == types.uint16)
        place_of_largest = b.bitcast(largest_at, _LANES.as_pointer())
        top = b.load(place_of_largest, align=4)
        for member in range(4):
            scale = factors(column_at, member)
            if cross is not types.none:
                cross_at = pointer(context, b, cross, values[3])
                one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), values[4], ir.Constant(I32, 0))
                scale = b.fadd(scale, b.fmul(shuffle(b, one, one, [0] * GROUPS), factors(cross_at, member)))
            members[member] = b.fmul(members[member], scale)
            bits = b.and_(b.bitcast(members[member], _LANES), _lanes(0x7FFFFFFF))
            top = b.select(b.icmp_signed(">", bits, top), bits, top)
        b.store(top, place_of_largest, align=4)
        word = _pack(b, _settle(b, members))
        b.store(word, b.bitcast(b.gep(keep_at, [values[9]]), I32.as_pointer()), align=1)
        return context.get_dummy_value()

    arguments = (flat, types.int64, column, cross, types.float32, types.int64, types.int64, largest, keep, types.int64)
    return types.void(*arguments), generate


@jit
def _select(flat, stride, columns, first, last, column, cross, row, groups, keep, finite):  # type: ignore[no-untyped-def]
    """Rows `first` to `last - 1`; `column` and `cross` hold `groups` factors for each of the four members."""
    largest, tail, word = np.empty(GROUPS, np.int32), np.empty(WORD, flat.dtype), np.empty(4, np.uint8)
    width = (columns + 7) // 8
    whole = columns // WORD * WORD
    for i in range(first, last):
        largest[:] = 0
        start, place = i * stride, i * width
        for c in range(0, whole, WORD):
            _word(flat, start + c, column, cross, row[i], groups, c // 4, largest, keep, place + c // 8)
        if whole < columns:
            for k in range(WORD):
                tail[k] = flat[start + whole + k] if whole + k < columns else 0
            _word(tail, 0, column, cross, row[i], groups, whole // 4, largest, word, 0)
            for byte in range(whole // 8, width):
                have = min(8, columns - 8 * byte)
                keep[place + byte] = word[byte - whole // 8] & ((1 << have) - 1)
        top = 0
        for lane in range(GROUPS):
            top = max(top, largest[lane])
        finite[i] = top < INFINITY


def _by_member(factor: Array, groups: int) -> Array:
    """(in,) factors as four runs of `groups`, one for each place in a group; zeros where there is no input."""
    laid = np.zeros((4, groups), np.float32)
    laid[:, : factor.shape[0] // 4] = factor.reshape(-1, 4).T
    return laid.reshape(-1)


def select(weight: Tensor, column: Array, row: Array, cross: Array) -> tuple[Array, Array]:
    """The packed mask, uint8 (out, ceil(in / 8)), and for each row whether all its contributions are finite.

    Args:
        weight: on the CPU, shape (out, in), in divisible by 4.
        column: float32, shape (in,).
        row: float32, shape (out,).
        cross: float32, shape (in,); all zeros for metrics without.
    """
    rows, columns = weight.shape
    flat, stride = flat_rows(weight)
    groups = -(-columns // WORD) * GROUPS
    by_member = _by_member(column, groups)
    crossed = _by_member(cross, groups) if cross.any() else None
    keep, finite = np.empty((rows, -(-columns // 8)), np.uint8), np.empty(rows, np.bool_)

    def work(first: int, last: int) -> None:
        _select(flat, stride, columns, first, last, by_member, crossed, row, groups, keep.reshape(-1), finite)

    over_rows(work, rows, columns)
    return keep, finite
