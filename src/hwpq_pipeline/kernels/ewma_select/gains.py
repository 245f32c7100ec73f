"""The warm start's gains, which all versions share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

#: Memories (1/gain) of the running estimates that the warm start reads.
WARM_MEMORIES = 2


def warm_gains(alpha: float, beta: float, columns: int) -> np.ndarray[Any, Any]:
    """The warm start step by step, float64, (3, warm): the gain of μ, what S is faded by, the weight of |d| in it."""
    warm = min(columns, math.ceil(WARM_MEMORIES / min(alpha, beta)))
    plain = 1.0 / np.arange(1, warm + 1)
    of_sigma = np.maximum(plain, beta)
    of_sigma[0] = 0  # the first value is μ itself and says nothing about σ
    return np.stack([np.maximum(plain, alpha), 1 - of_sigma, of_sigma / beta])
