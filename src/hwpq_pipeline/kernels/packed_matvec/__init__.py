"""``y = (s ∘ W) x`` for one ``x`` and a 2:4 weight that stays packed: what decoding a token does with a layer.

A token's product reads every weight once and computes two operations with it, so memory sets its time. Packed, a 2:4
weight in 8 bits takes 5 bits an input (two values and two 2-bit positions for four), where bfloat16 takes 16 and
float32 32.

**Layout.** `arrange` puts `LANES` rows side by side, a lane each, once, when the layer is loaded:

    values     (blocks, in / 4, 2, LANES)   the first, then the second value of each group of four
    positions  (blocks, in / 32, LANES)     uint32: the positions of eight groups, four bits a group
    scale      (blocks, scale groups, LANES) float32

with in padded to whole words of 32 inputs and out to whole blocks, by zeros. All lanes are at the same group of four at
the same time, so that its four inputs are loaded once and each lane picks its own by two bits: one instruction
(`vpermilps`) for eight lanes where there is AVX, three selections elsewhere. No gather, no branch.

**Kinds of values.** float32, bfloat16 and float16 as they are, int8, and FP8 E4M3, whose bits shifted to where float32
keeps its exponent and mantissa are the same number times 2⁻¹²⁰, subnormals included; the powers of two are made up for
in ``x`` and in the scale. Sums are float32, a lane's in order of its inputs.

``reference`` is the readable oracle, ``cpu`` the kernel.
"""

from __future__ import annotations

__all__ = ["KINDS", "LANES", "WORD"]

#: Rows side by side; inputs whose positions fill a 32-bit word.
LANES, WORD = 32, 32
KINDS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
