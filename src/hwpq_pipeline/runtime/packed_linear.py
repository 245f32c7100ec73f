"""A linear layer whose 2:4 weight stays packed on the CPU.

Up to `FEW` rows of inputs (decoding, short prompts) go through the packed kernel, which reads the packed bytes once.
For more rows it is worth unpacking the weight: it is made dense, used and dropped. That costs about as much as the
kernel's product of some hundreds of tokens, and no lasting memory. The inputs are float32. Activations are not
rounded to FP8 or INT8, so results are a little closer to the dense model than those of the compressed-tensors export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.packed import PackedLayer
from hwpq_pipeline.compression.codes import scaled
from hwpq_pipeline.compression.packing import unpack_two_of_four
from hwpq_pipeline.kernels import packed_matvec

#: Largest number of rows of inputs for the packed kernel.
FEW = 256


def dense_weight(packed: PackedLayer, *, where: str) -> Tensor:
    """(out, in) float32 weights of a packed layer.

    Args:
        packed: the layer.
        where: its name, for errors.

    Raises:
        HwpqError: shapes that do not belong together, or positions that name one column twice.
    """
    weight = unpack_two_of_four(packed.kept, packed.positions, where=where)
    return weight.float() if packed.scale is None else scaled(weight, packed.scale)


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed 2:4 weight, for inference on the CPU.

    Args:
        packed: the layer; several groups of scales are whole 32 inputs each.
        bias: (out,) or None.
        name: the layer's name, for errors.
    """

    def __init__(self, packed: PackedLayer, bias: Tensor | None = None, *, name: str = "layer") -> None:
        super().__init__()
        kept, scale = packed.kept, packed.scale
        rows = kept.shape[0]
        self.name, self.in_features, self.out_features = name, 2 * kept.shape[1], rows
        self.bias = None if bias is None else bias.float()
        self._arranged = packed_matvec.arrange(kept, packed.positions, torch.ones(rows, 1) if scale is None else scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), with the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        if rows.shape[0] <= FEW:
            result = packed_matvec.packed_matvec(self._arranged, rows)
        else:
            result = rows @ dense_weight(PackedLayer(*packed_matvec.disarrange(self._arranged)), where=self.name).T
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self._arranged.kind}"
