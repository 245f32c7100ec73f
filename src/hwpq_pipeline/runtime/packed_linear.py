"""A linear layer whose 2:4 weight stays packed on the CPU (`kernels.packed_linear`).

Few rows of inputs (decoding, short prompts) go through a packed kernel, which reads the packed bytes once. For more
rows it may be worth unpacking the weight: it is made dense, used and dropped, which costs no lasting memory. The native
kernel keeps integers packed however many rows there are.

Activations are not rounded to FP8 or INT8, so results are a little closer to the dense model than those of the
compressed-tensors export. The native kernel rounds the inputs of integer weights, with a scale for each 32 of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.packed import PackedLayer
from hwpq_pipeline.compression.codes import scaled
from hwpq_pipeline.compression.packing import check_positions, unpack_two_of_four
from hwpq_pipeline.kernels.packed_linear import Kernel, Packed, arrange, packed_linear

from .fixed import Fixed

if TYPE_CHECKING:
    from .shared_inputs import SharedProduct


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


class PackedLinear(Fixed):
    """`nn.Linear` with a packed 2:4 weight, for inference on the CPU.

    Args:
        packed: the layer; several groups of scales are whole 32 inputs each.
        bias: (out,) or None.
        name: the layer's name, for errors.
        kernel: which; `native` is built beforehand.
    """

    def __init__(
        self, packed: PackedLayer, bias: Tensor | None = None, *, name: str = "layer", kernel: Kernel = "numba"
    ) -> None:
        super().__init__()
        self.kernel = kernel
        check_positions(packed.positions, packed.kept.shape[1], where=name)
        kept, scale = packed.kept, packed.scale
        rows = kept.shape[0]
        self.in_features, self.out_features = 2 * kept.shape[1], rows
        self.bias = None if bias is None else bias.float()
        ones = torch.ones(rows, 1) if scale is None else scale
        self.weight: Packed = arrange(kept, packed.positions, ones, four_bits=packed.four_bits)
        self.shared: tuple[SharedProduct, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), with the dtype of `x`.

        Raises:
            HwpqError: inputs that are no floats, of another width, or that want gradients.
        """
        if self.shared is not None:
            product, number = self.shared
            return product.part(number, x)
        return packed_linear(self.weight, x, self.bias, kernel=self.kernel)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.weight.kind}"
