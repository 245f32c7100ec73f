"""Running exports: `from hwpq_pipeline.runtime import load_packed` for packed 2:4, `onnx_session` for ONNX."""

from .loading import load_packed
from .packed_linear import PackedLinear

__all__ = ["PackedLinear", "load_packed"]
