"""An ONNX graph while it is built: its nodes, and its weights in a file beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The domain of ONNX Runtime's own operations.
MICROSOFT = "com.microsoft"
_ALIGNMENT = 64


class Graph:
    """Nodes and weights; the weights' bytes go to the data file as they come."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, operator: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        """Add an operation; gives back the name of its first output."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        domain = MICROSOFT if operator in ("MatMulNBits", "GroupQueryAttention") else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a weight of any dtype; gives back its name."""
        from onnx import TensorProto

        kinds = {
            torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
            torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN, torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8,
            torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32,
        }  # fmt: skip
        content = tensor.contiguous().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy()
        self.data.write(b"\0" * (-self.data.tell() % _ALIGNMENT))
        proto = TensorProto(
            name=name, dims=list(tensor.shape), data_type=kinds[tensor.dtype], data_location=TensorProto.EXTERNAL
        )
        places = {"location": "model.onnx.data", "offset": self.data.tell(), "length": tensor.nbytes}
        for key, value in places.items():
            proto.external_data.add(key=key, value=str(value))
        self.data.write(content.tobytes())
        self.weights.append(proto)
        return name

    def small(self, name: str, values: Any) -> str:
        """Add a constant that the graph's own shapes are worked out from; it lies in the model file."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.array(values), name))
        return name
