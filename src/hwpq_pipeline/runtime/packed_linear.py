"""A linear layer whose 2:4 weight stays packed on the CPU.

Up to `FEW` rows of inputs (decoding, short prompts) go through the packed kernel, which reads the packed bytes once.
More of them are worth unpacking the weight for: it is made dense, used and dropped, which costs about as much as the
kernel's product of some hundreds of tokens, and no lasting memory. Inputs are computed with in float32; activations are
not rounded to FP8 or INT8, so results are a little closer to the dense model than those of the compressed-tensors
export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwpq_pipeline.compression.packing import unpack_two_of_four
from hwpq_pipeline.kernels import packed_matvec

#: Rows of inputs up to which the packed kernel is run.
FEW = 256


def dense_weight(kept: Tensor, positions: Tensor, scale: Tensor | None, *, where: str) -> Tensor:
    """(out, in) float32 weights of a packed layer.

    Args:
        kept: (out, in / 2), codes or weights.
        positions: (out, ⌈in / 8⌉) uint8.
        scale: (out, groups), or None for a layer that is not quantized.
        where: the layer's name, for errors.
    """
    weight = unpack_two_of_four(kept, positions, where=where).float()
    if scale is None:
        return weight
    rows, groups = scale.shape
    return (weight.view(rows, groups, -1) * scale.float()[:, :, None]).view(weight.shape)


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed 2:4 weight, for inference on the CPU.

    Args:
        kept: (out, in / 2), float32, bfloat16, float16, float8_e4m3fn or int8.
        positions: (out, ⌈in / 8⌉) uint8.
        scale: (out, groups) float, or None for a scale of one; several groups are of whole 32 inputs each.
        bias: (out,) or None.
        name: the layer's name, for errors.
    """

    def __init__(
        self, kept: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None = None, *, name: str = "layer"
    ) -> None:
        super().__init__()
        rows = kept.shape[0]
        self.name, self.in_features, self.out_features = name, 2 * kept.shape[1], rows
        self.bias = None if bias is None else bias.float()
        self._arranged = packed_matvec.arrange(kept, positions, torch.ones(rows, 1) if scale is None else scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), dtype of ``x``."""
        rows = x.reshape(-1, self.in_features).float()
        if rows.shape[0] <= FEW:
            result = packed_matvec.packed_matvec(self._arranged, rows)
        else:
            result = rows @ dense_weight(*packed_matvec.disarrange(self._arranged), where=self.name).T
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self._arranged.kind}"
