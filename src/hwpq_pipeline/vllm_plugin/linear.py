"""Packed 2:4 layers in vLLM.

Packing is along the inputs, so rows are stacked and cut as those of a dense weight: q, k and v lie one below the other,
and each rank of a column-parallel layer has its rows. A row-parallel layer is cut along its inputs, in whole words of
32 and whole groups of scales.

vLLM does not notice tensors that are missing. So positions and scales begin as values that no export holds, and what is
left of them after loading is an error.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from hwpq_pipeline.checkpoints.packed_form import AGAIN, PackedForm
from hwpq_pipeline.compression.packing import check_positions, unpack_nibbles
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.packed_linear import KINDS, WORD, Kernel, arrange, native, packed_linear_op

logger = logging.getLogger(__name__)


@register_weight_loader_v2_supported_method
class HwpqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A packed layer.

    Args:
        form: what the export holds.
        prefix: the layer's name, for errors.
    """

    def __init__(self, form: PackedForm, prefix: str) -> None:
        self.form, self.prefix = form, prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters of the file's shapes: those of vLLM's interface.

        Raises:
            HwpqError: a shard that cuts a word of inputs or a group of scales.
        """
        del output_size, params_dtype
        rows, columns, form = sum(output_partition_sizes), input_size_per_partition, self.form
        if columns != input_size and columns % max(WORD, form.group_size or WORD):
            raise HwpqError(
                f"{input_size} inputs cannot be cut into shards of {columns}: whole groups of "
                f"{max(WORD, form.group_size or WORD)} are needed",
                where=self.prefix,
                remedy="Set a smaller --tensor-parallel-size.",
            )
        both = {"weight_loader": extra_weight_attrs["weight_loader"], "output_dim": 0}
        kept = torch.zeros(rows, columns // (4 if form.four_bits else 2), dtype=getattr(torch, form.kept_dtype))
        positions = torch.zeros(
            rows, -(-columns // 8), dtype=torch.uint8
        )  # one column twice: not to be found in a file
        layer.register_parameter("weight_kept", ModelWeightParameter(data=kept, input_dim=1, **both))
        layer.register_parameter("weight_positions", ModelWeightParameter(data=positions, input_dim=1, **both))
        if form.scale_dtype is not None:
            groups = 1 if form.group_size is None else columns // form.group_size
            scale = torch.full((rows, groups), torch.nan, dtype=getattr(torch, form.scale_dtype))
            made = (
                ChannelQuantScaleParameter(data=scale, **both)
                if form.group_size is None
                else GroupQuantScaleParameter(data=scale, input_dim=1, **both)
            )
            layer.register_parameter("weight_scale", made)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the weights into the kernel's layout.

        Raises:
            HwpqError: a tensor that the file lacks.
        """
        kept, positions = layer.weight_kept.data, layer.weight_positions.data
        scale = torch.ones(kept.shape[0], 1) if self.form.scale_dtype is None else layer.weight_scale.data.float()
        if not bool(scale.isfinite().all()):
            raise HwpqError("no tensor weight_scale", where=self.prefix, remedy=AGAIN)
        if self.form.four_bits:
            kept = unpack_nibbles(kept)
        check_positions(positions, kept.shape[1], where=self.prefix)
        packed = arrange(kept, positions, scale, four_bits=self.form.four_bits)
        for name in ("weight_kept", "weight_positions", "weight_scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        # Plain buffers: vLLM's parameters answer every call in Python.
        for name, tensor in (("values", packed.values), ("places", packed.places), ("scale", packed.scale)):
            layer.register_buffer(f"packed_{name}", tensor, persistent=False)
        layer.packed_kind, layer.packed_rows = KINDS.index(packed.kind), packed.shape[0]
        self.op = packed_linear_op(best_kernel())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x (s ∘ W)ᵀ + b`, with the dtype of `x`."""
        result: Tensor = self.op(
            x, layer.packed_values, layer.packed_places, layer.packed_scale, bias, layer.packed_kind, layer.packed_rows
        )
        return result


@functools.cache
def best_kernel() -> Kernel:
    """The C++ kernel, which shares vLLM's threads. Without a compiler numba's, which has threads of its own."""
    try:
        native.build()
    except HwpqError as error:
        logger.warning("%s numba's kernel is used: it is slower and competes with vLLM's threads.", error)
        return "numba"
    return "native"
