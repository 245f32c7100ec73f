"""Numbers that a scale may be once it is stored: a short mantissa, between two limits.

A scale is rounded to such a number before the codes are chosen for it. So what is stored is what was optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_MANTISSA = 23


@dataclass(frozen=True)
class Stored:
    """The numbers `1.m · 2^e` whose mantissa `m` has few bits.

    Attributes:
        mantissa: bits behind the leading one; 0 leaves powers of two.
        least, most: the smallest and the largest number.
    """

    mantissa: int = FLOAT32_MANTISSA
    least: float = torch.finfo(torch.float32).tiny
    most: float = torch.finfo(torch.float32).max

    @classmethod
    def of(cls, dtype: torch.dtype) -> Stored:
        """The normal numbers of a float dtype of at most 32 bits."""
        kind = torch.finfo(dtype)
        return cls(round(-torch.tensor(kind.eps).log2().item()), kind.smallest_normal, kind.max)

    @property
    def dropped(self) -> int:
        """Last bits of a float32 that are zero."""
        return FLOAT32_MANTISSA - self.mantissa

    def hold(self, values: Tensor) -> bool:
        """Whether all values, float32, are such numbers."""
        last = values.view(torch.int32) & ((1 << self.dropped) - 1)
        return not bool(((last != 0) | (values < self.least) | (values > self.most)).any())


FLOAT32 = Stored()
