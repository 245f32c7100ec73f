"""Coordinate descent over weights and mask together: ``min ½ tr((V − V₀) Ĝ (V − V₀)ᵀ)`` over sparse ``V``.

``Ĝ`` (in, in) is the Gram matrix scaled to ones on its diagonal and ``V`` the weight in the scaled variables (see
``compression.refinement``).  A sweep walks a row's columns from left to right; with everything else fixed, one part of
the row gets its best values, the number of non-zeros included:

- ``two_of_four``: a part is an aligned group of four.  Each of the six pairs is a 2×2 system with the gain
  ``½ b_S Ĥ_S⁻¹ b_Sᵀ``, where ``b = v Ĥ − (V − V₀)Ĝ`` and ``Ĥ`` is the group's 4×4 tile; the pair of the highest
  gain stays.
- ``above``: a part is one column.  Its best value is ``b = v − ((V − V₀)Ĝ)_j``, which gains ``½ b²``; it stays where
  ``|b|`` is above a threshold.
- ``fixed``: as ``above``, where the mask alone says what stays.

What does not stay is multiplied by ``shrink``: 0 takes it out; a number in between lets go of it over several
sweeps, in which the rest of the row already makes up for the loss.

``reference`` is the readable oracle (float64, one row, the gradient recomputed at every move), ``cpu`` the kernels.
"""

from __future__ import annotations

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The six ways to keep two of four; of equal gains the first stays."""

RIDGE = 1e-6
"""Added to a pair's determinant (at most one), for columns that are copies of each other."""

__all__ = ["PAIRS", "RIDGE"]
