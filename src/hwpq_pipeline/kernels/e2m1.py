"""E2M1, the 4-bit float, in halves: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives. Its rounding, for the CPU kernels."""

from __future__ import annotations

import numpy as np

from hwpq_pipeline.kernels.contracted import jit_contracted


@jit_contracted
def nearest_code(value: np.float32) -> np.float32:
    """The code nearest a number between −12 and 12; halfway, the one with the even mantissa."""
    size = abs(value)
    step = np.float32(1.0) if size <= 4 else np.float32(2.0) if size <= 8 else np.float32(4.0)
    return step * np.rint(value / step)
