"""An embedding and a head that stay INT8 codes (`kernels.int8_linear`)."""

from __future__ import annotations

import torch
from torch import Tensor

from hwpq_pipeline.kernels.int8_linear import int8_linear, int8_rows

from .fixed import Fixed


class Int8Embedding(Fixed):
    """`nn.Embedding` of codes.

    Args:
        codes: (rows, in) int8.
        scale: (rows, 1).
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.codes, self.scale = codes, scale.flatten()

    def forward(self, ids: Tensor) -> Tensor:
        """(…, in) float32 of ids (…)."""
        return int8_rows(ids, self.codes, self.scale, torch.float32)


class Int8Head(Fixed):
    """`nn.Linear` of codes, its products in bfloat16.

    Args:
        codes: (out, in) int8.
        scale: (out, 1).
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.codes, self.scale = codes, scale.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) of (…, in), with the dtype of `x`.

        Raises:
            HwpqError: inputs that are no floats, of another width, or that want gradients.
        """
        return int8_linear(x, self.codes, self.scale)
