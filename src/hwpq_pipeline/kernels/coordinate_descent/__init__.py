"""Coordinate descent over codes: ``min ½ tr((Q − W₀) G (Q − W₀)ᵀ)`` with ``q_j = scale · code_j`` on an integer grid.

``reference`` is the readable oracle (float64), ``cpu`` the kernel that the pipeline runs.  Both walk a row's groups in
order: first each column of the group takes the code that minimises the quadratic with all else fixed, then, if asked,
the group's scale takes its own minimiser.  Every move is exact in its coordinate, so the objective never rises.

A code moves only if its target lies more than half a step (and ``TIE`` of a step) away from it, and then to the nearest
code.  On a tie the present code stays: the two versions agree except where float32 and float64 see the target on
different sides of that line.
"""

from __future__ import annotations

TIE = 1e-4
"""Of a step: how far past the midpoint a target must lie before its code moves."""

__all__ = ["TIE"]
