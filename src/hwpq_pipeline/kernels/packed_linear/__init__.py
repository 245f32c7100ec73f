"""`y = x (s ∘ W)ᵀ + b` for a 2:4 weight that stays packed: what decoding a token does with a layer.

A token's product reads every weight once and computes two operations with it, so memory sets its time. Packed, a 2:4
weight takes 5 bits an input in 8 bits and 3 bits in 4 bits (two values and two 2-bit places for four inputs), where
bfloat16 takes 16 and float32 takes 32.

**Layout** (`layout`). Eight rows stand side by side, a word of 32 inputs at a time. Of a word a row keeps 16 values and
their 16 places, so that the places of eight rows fill a vector of 32 bytes. All rows are at the same inputs at the same
time: these are loaded once, and each row picks its own by a shuffle. There is no gather and no branch. Outputs are
padded to whole eights and inputs to whole words, by zeros.

**Kinds of values.** float32, bfloat16, float16 and integers are read as they are. FP8 E4M3's bits are shifted to where
float32 keeps its exponent and mantissa. This gives the same number times 2⁻¹²⁰, subnormals included; the scale makes up
for the power of two, in two steps so that no product leaves float32's range.

**Two kernels, one layout.** `cpu` is numba's: inputs stay float32. `native` is C++ and optional (`native.build`): it
rounds the inputs of integer weights to INT8, with a scale for each 32 of them, so that a byte instruction multiplies
many at once; it runs on torch's own threads, and a call costs less. `reference` is the readable oracle. There is no
`cuda` yet: packed weights lie on the CPU, and inputs on a GPU are copied there and the product back.

**The op** is `torch.ops.hwpq.packed_linear`, with a fake implementation, so that `torch.compile` traces through it. The
native kernel's is `torch.ops.hwpq_native.packed_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.devices import on_the_cpu, to_the_cpu
from hwpq_pipeline.kernels.inference import check_input
from hwpq_pipeline.kernels.packed_linear import layout, native
from hwpq_pipeline.kernels.packed_linear.layout import KINDS, KINDS_OF_INTEGERS, ROWS, WORD

__all__ = [
    "KINDS", "KINDS_OF_INTEGERS", "ROWS", "WORD", "Kernel",
    "Packed", "arrange", "disarrange", "packed_linear", "packed_linear_op", "unpack",
]  # fmt: skip

Kernel = Literal["numba", "native"]
_KERNELS = get_args(Kernel)
#: Rows of inputs up to which numba's kernel is faster than to unpack the weight and multiply.
FEW = 256


@dataclass(frozen=True)
class Packed:
    """A packed weight in the kernels' layout, on the CPU.

    Attributes:
        values: (blocks, words, bytes) uint8: the kept values of eight rows and 32 inputs.
        places: (blocks, words, 32) uint8: their places.
        scale: (blocks, scale groups, 8) float32.
        kind: a name in `KINDS`.
        shape: (out, in) of the weight that it stands for.

    Raises:
        ValueError: tensors that do not belong together.
    """

    values: Tensor
    places: Tensor
    scale: Tensor
    kind: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        words = layout.check_weight(self.values, self.places, self.scale, KINDS.index(self.kind), rows)
        if -(-columns // WORD) != words:
            raise ValueError(f"packed_linear: {columns} inputs for {words} words of {WORD}")

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.values.nbytes + self.places.nbytes + self.scale.nbytes


def arrange(kept: Tensor, positions: Tensor, scale: Tensor, *, four_bits: bool = False) -> Packed:
    """Put a packed weight into the kernels' layout; done once, when a layer is loaded.

    Args:
        kept: (out, in / 2), dtype one of `KINDS`.
        positions: (out, ⌈in / 8⌉) uint8 (`compression.packing`).
        scale: (out, scale groups); each of several groups must be whole words of 32 inputs.
        four_bits: whether the values are int8 codes between −8 and 7, which are then kept as two a byte.

    Raises:
        HwpqError: a device without a kernel.
    """
    kept, positions, scale = to_the_cpu(kept, positions, scale, where="packed_linear")
    kind = "int4" if four_bits else str(kept.dtype).removeprefix("torch.")
    return Packed(
        layout.values_of(kept, kind),
        layout.places_of(positions, kind),
        layout.scale_of(scale),
        kind,
        (kept.shape[0], 2 * kept.shape[1]),
    )


def disarrange(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """The kept values, positions and scale that `arrange` was given, on the CPU."""
    rows, columns = weight.shape
    return (
        layout.kept_of(weight.values, weight.kind)[:rows, : columns // 2],
        layout.positions_of(weight.places, weight.kind)[:rows, : -(-columns // 8)],
        weight.scale.transpose(1, 2).reshape(-1, weight.scale.shape[1])[:rows],
    )


def packed_linear(weight: Packed, x: Tensor, bias: Tensor | None = None, *, kernel: Kernel = "numba") -> Tensor:
    """`nn.functional.linear` with a packed weight: (…, in) to (…, out), with the dtype and on the device of `x`.

    Args:
        weight: `arrange`'s.
        x: (…, in), any float dtype.
        bias: (out,) or None, on the CPU.
        kernel: which.

    Raises:
        HwpqError: inputs that are no floats, of another width, or that want gradients; a device without a kernel; an
            unknown kernel, or no compiler for the native one.
    """
    check_input(x, weight.shape[1], where="packed_linear")
    op = packed_linear_op(kernel)
    if kernel == "numba" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _multiply(weight, bias, x)  # the dispatcher's way into Python and back costs more than a small product
    arguments = (weight.values, weight.places, weight.scale, bias, KINDS.index(weight.kind), weight.shape[0])
    if x.device.type == "cpu":
        return op(x, *arguments)
    return on_the_cpu(lambda given: op(given, *arguments), x, where="packed_linear")


def packed_linear_op(kernel: Kernel) -> Callable[..., Tensor]:
    """A kernel's op: (x, values, places, scale, bias, kind, rows) to the product.

    Raises:
        HwpqError: an unknown name, or no compiler for the native one.
    """
    if kernel not in _KERNELS:
        raise HwpqError(f"no kernel {kernel!r}", where="packed_linear", remedy=f"Choose one of {', '.join(_KERNELS)}.")
    found: Callable[..., Tensor] = torch.ops.hwpq.packed_linear.default
    if kernel == "native":
        if not torch.compiler.is_compiling():  # nothing is built while it is traced
            native.build()
        found = torch.ops.hwpq_native.packed_linear.default
    return found


def unpack(weight: Packed) -> Tensor:
    """(out, in) float32: the weight with zeros in their places, scales included."""
    kept, positions, scale = disarrange(weight)
    rows, columns = weight.shape
    nibbles = torch.stack([positions & 15, positions >> 4], dim=2).view(rows, -1)[:, : columns // 4]
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=2).long()
    whole = torch.zeros(rows, columns // 4, 4).scatter_(2, places, kept.float().view(*places.shape))
    return (whole.view(*scale.shape, -1) * scale[..., None]).view(rows, columns)


_library = torch.library.Library("hwpq", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor values, Tensor places, Tensor scale, Tensor? bias, int kind, int rows) -> Tensor"
)


def _by_numba(
    x: Tensor, values: Tensor, places: Tensor, scale: Tensor, bias: Tensor | None, kind: int, rows: int
) -> Tensor:
    if not 0 <= kind < len(KINDS):
        raise ValueError("packed_linear: no such kind of values")
    weight = Packed(values, places, scale, KINDS[kind], (rows, x.shape[-1] if x.ndim else 0))
    check_input(x, weight.shape[1], where="packed_linear")
    return _multiply(weight, bias, x)


def _multiply(weight: Packed, bias: Tensor | None, x: Tensor) -> Tensor:
    """By numba's kernel, whose inputs are checked."""
    rows, columns = weight.shape
    if bias is not None:
        layout.check_bias(bias, rows)
    given = x.reshape(-1, columns).float()
    if given.shape[0] <= FEW:
        from hwpq_pipeline.kernels.packed_linear import cpu

        result = cpu.packed_linear(weight, given)
    else:
        result = given @ unpack(weight).T
    if bias is not None:
        result = result + bias
    return result.view(*x.shape[:-1], rows).to(x.dtype)


_library.impl("packed_linear", _by_numba, "CPU")
torch.library.register_fake("hwpq::packed_linear", layout.fake)
