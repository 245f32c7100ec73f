"""Compiling the kernels whose results are defined by an objective, not to the bit.

As `kernels.jit`, but multiplications may be fused into additions and sums may be taken in any order, which is what
lets LLVM vectorise them.  Infinities and NaNs keep their meaning; callers refuse them beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_FLAGS = {"contract", "reassoc", "nsz"}


def jit_contracted(function: Callable[..., Any]) -> Any:
    """Compile for the CPU: no GIL, numpy's error model, sums in any order, cached on disk where that is possible."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": _FLAGS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory that it may write to
        return numba.njit(cache=False, **options)(function)
