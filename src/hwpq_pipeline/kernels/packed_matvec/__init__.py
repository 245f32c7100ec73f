"""`y = (s ∘ W) x` for one `x` and a 2:4 weight that stays packed: what decoding a token does with a layer.

A token's product reads every weight once and computes two operations with it, so memory sets its time. Packed, a 2:4
weight in 8 bits takes 5 bits an input (two values and two 2-bit positions for four), where bfloat16 takes 16 and
float32 takes 32.

**Layout.** `arrange` puts `LANES` rows side by side, one in each lane. This is done once, when the layer is loaded:

    values     (blocks, in / 4, 2, LANES)   the first, then the second value of each group of four
    positions  (blocks, in / 32, LANES)     uint32: the positions of eight groups, four bits a group
    scale      (blocks, scale groups, LANES) float32

Inputs are padded to whole words of 32 and outputs to whole blocks, by zeros. All lanes are at the same group of four at
the same time, so its four inputs are loaded once and each lane picks its own by two bits. That is one instruction
(`vpermilps`) for eight lanes where there is AVX, and three selections elsewhere. There is no gather and no branch.

**Kinds of values.** float32, bfloat16, float16 and int8 are read as they are. FP8 E4M3's bits are shifted to where
float32 keeps its exponent and mantissa. This gives the same number times 2⁻¹²⁰, subnormals included; `x` and the scale
make up for the power of two. Sums are float32, a lane's in order of its inputs.

`reference` is the readable oracle, `cpu` the kernel. There is no `cuda` yet: packed weights lie on the CPU, and inputs
on a GPU are copied there and the product back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from hwpq_pipeline.kernels.devices import on_the_cpu, to_the_cpu

__all__ = ["KINDS", "LANES", "WORD", "Arranged", "arrange", "disarrange", "packed_matvec"]

#: Rows side by side; inputs whose positions fill a 32-bit word.
LANES, WORD = 32, 32
KINDS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Arranged:
    """A packed weight in the kernel's layout (see above), ready to be multiplied; on the CPU.

    Attributes:
        values: (blocks, in / 4, 2, LANES), dtype by kind; bfloat16 and float16 as their bits.
        positions: (blocks, in / 32, LANES) uint32.
        scale: (blocks, scale groups, LANES) float32.
        kind: a name in `KINDS`.
        shape: (out, in) of the weight that it stands for.
    """

    values: Array
    positions: Array
    scale: Array
    kind: str
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.values.nbytes + self.positions.nbytes + self.scale.nbytes


def arrange(kept: Tensor, positions: Tensor, scale: Tensor) -> Arranged:
    """Put a packed weight into the kernel's layout.

    Args:
        kept: (out, in / 2), dtype one of `KINDS`.
        positions: (out, ⌈in / 8⌉) uint8.
        scale: (out, scale groups); each of several groups must be whole words of 32 inputs.

    Raises:
        HwpqError: a device without a kernel.
    """
    from hwpq_pipeline.kernels.packed_matvec import cpu

    return cpu.arrange(*to_the_cpu(kept, positions, scale, where="packed_matvec"))


def disarrange(weight: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """The kept values, positions and scale that `arrange` was given, on the CPU."""
    from hwpq_pipeline.kernels.packed_matvec import cpu

    return cpu.disarrange(weight)


def packed_matvec(weight: Arranged, x: Tensor) -> Tensor:
    """The weight times `x`: (out,) float32 for (in,) float32, (n, out) for (n, in), on the device that `x` is on.

    Raises:
        HwpqError: a device without a kernel.
    """
    from hwpq_pipeline.kernels.packed_matvec import cpu

    return on_the_cpu(partial(cpu.packed_matvec, weight), x, where="packed_matvec")
