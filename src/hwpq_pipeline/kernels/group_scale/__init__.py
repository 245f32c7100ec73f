"""The scale of a group of weights that are to be integers of few bits: ``min_s Σ h (s·code(w/s) − w)²``.

``code`` rounds to the nearest integer and saturates.  The error is piecewise smooth in ``s`` with many local
minima, so ``s`` is searched: ``CANDIDATES`` scales from the one that saturates nothing down to ``SMALLEST`` of it,
the first of the best kept; then ``REFITS`` times ``s`` becomes the closed-form minimiser ``Σ h c w / Σ h c²`` for
the codes ``c`` that it gives, where that lowers the error.

``reference`` is the readable oracle (float64 tensors), ``cpu`` the kernel.  Their scales may differ where two
candidates have the same error in float32; their errors agree.
"""

from __future__ import annotations

CANDIDATES = 40
REFITS = 2
SMALLEST = 0.25

__all__ = ["CANDIDATES", "REFITS", "SMALLEST"]
