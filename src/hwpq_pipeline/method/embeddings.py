"""The embedding and the head on a grid, rounded to nearest with a scale a row.

In a small model they are half of the bytes that 4-bit layers leave. They are rounded in 8 bits alone: the head's errors
go straight into the logits, and there is no sum of inputs to make them good with.

Rows are independent, so that a table of 262,144 rows is rounded a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hwpq_pipeline.checkpoints.layers import Layer, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.rounding import quantize

_ROWS = 16_384


def rounded_embeddings(model: str | Path, grid: str | None) -> Iterator[tuple[Layer, Quantized]]:
    """The model's embedding, and its head if that is not tied to it, each with codes (rows, hidden) and scales.

    Args:
        model: the dense checkpoint.
        grid: a name in `compression.grids.EMBEDDINGS`; None for nothing.

    Raises:
        HwpqError: values that are not finite.
    """
    if grid is None:
        return
    checkpoint = Checkpoint(model)
    for table in layer_map(model).tables:
        weight = checkpoint.tensor(table.stored.tensor)
        dtype = checkpoint.torch_dtype
        parts = [quantize(part, grid, scale_dtype=dtype, where=table.name) for part in weight.split(_ROWS)]
        codes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
        yield table, replace(parts[0], codes=codes, scale=scale)
