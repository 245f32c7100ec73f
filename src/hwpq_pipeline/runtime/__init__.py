"""Running the packed 2:4 export: `from hwpq_pipeline.runtime import load_packed`."""

from .loading import load_packed
from .packed_linear import PackedLinear

__all__ = ["PackedLinear", "load_packed"]
