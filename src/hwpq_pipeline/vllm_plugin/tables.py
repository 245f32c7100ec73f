"""An embedding and a head in codes.

INT8 codes stay codes: torch's own kernel for INT8 weights multiplies the head, and the embedding's rows are scaled when
they are looked up. Other codes become numbers of the model's dtype when they are loaded: no kernel is faster on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from hwpq_pipeline.checkpoints.packed_form import AGAIN, PackedForm
from hwpq_pipeline.compression.codes import scaled
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.int8_linear import int8_linear, int8_rows


class HwpqTableMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An embedding or a head (rows, in) of codes with a scale a row.

    Args:
        form: what the export holds.
    """

    def __init__(self, form: PackedForm) -> None:
        self.plain = UnquantizedEmbeddingMethod()
        self.dtype = getattr(torch, str(form.table_dtype))
        self.scale_dtype = getattr(torch, form.scale_dtype or "float32")  # float32 holds those of a form without a grid

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
        """Parameters of the file's shapes, rows padded as vLLM wants them."""
        del input_size, output_size
        rows = sum(output_partition_sizes)
        self.computed = params_dtype
        for name, data in (
            ("weight", torch.zeros(rows, input_size_per_partition, dtype=self.dtype)),
            ("weight_scale", torch.full((rows, 1), torch.nan, dtype=self.scale_dtype)),
        ):
            parameter = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave INT8 codes as they are, and compute the numbers that others stand for.

        Raises:
            HwpqError: a tensor that the file lacks.
        """
        if not bool(layer.weight_scale.isfinite().all()):
            raise HwpqError("no tensor weight_scale of an embedding or head", where="packed.safetensors", remedy=AGAIN)
        if layer.weight.dtype == torch.int8:
            layer.packed_scale = layer.weight_scale.data.flatten()
        else:
            if layer.weight.dtype == self.dtype:  # else the tied one has done it
                layer.weight.data = scaled(layer.weight.data, layer.weight_scale.data).to(self.computed)
            self.plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits (…, rows) of (…, in)."""
        if layer.weight.dtype != torch.int8:
            result: Tensor = self.plain.apply(layer, x, bias)
            return result
        found = int8_linear(x, layer.weight.data, layer.packed_scale)
        return found if bias is None else found + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows (…, in) of ids."""
        if layer.weight.dtype != torch.int8:
            return torch.nn.functional.embedding(input_, layer.weight)
        return int8_rows(input_, layer.weight, layer.packed_scale, self.computed)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A head that has the embedding's weight.

        Raises:
            HwpqError: vLLM's model has built its embedding without asking for a method.
        """
        if not hasattr(embed_tokens, "weight_scale"):
            raise HwpqError(
                "vLLM's model takes no embedding in codes", where="quantization.embeddings", remedy="Set it to none."
            )
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer
