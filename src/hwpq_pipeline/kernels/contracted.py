"""Compiling the kernels whose results are defined by an objective, not to the bit.

As `kernels.jit`, but multiplications may be fused into additions and sums may be taken in any order, so that LLVM can
vectorise them. Infinities and NaNs keep their meaning; callers refuse them beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hwpq_pipeline.kernels import compiled


def jit_contracted(function: Callable[..., Any]) -> Any:
    """Compile for the CPU: no GIL, numpy's error model, sums in any order, cached on disk where that is possible."""
    return compiled(function, fastmath={"contract", "reassoc", "nsz"})
