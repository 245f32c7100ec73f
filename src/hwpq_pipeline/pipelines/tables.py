"""The layer table: what a pipeline did, a row a layer, in module order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from hwpq_pipeline.checkpoints.layers import Layer

IDENTITY = ("layer", "block", "kind", "rows", "columns")
#: What `select` and `compress` tell of a layer; `schemas.SelectedLayers` and `CompressedLayers` say what each is.
SELECTED = (
    "metric",
    "contribution_q01",
    "contribution_q50",
    "contribution_q99",
    "mean",
    "deviation",
    "multiplier",
    "wanted_sparsity",
    "reached_sparsity",
)
COMPRESSED = ("error_pruned", "error_recovered", "error_quantized")


def layer_table(
    layers: Iterable[Layer], facts: Mapping[str, Mapping[str, Any]], columns: Iterable[str]
) -> pd.DataFrame:
    """A table of `layers` with the `columns` of `facts`; what a layer's facts lack is missing.

    Args:
        layers: in the order of the rows.
        facts: by layer name.
        columns: to take from the facts, in this order.
    """
    columns = list(columns)
    return pd.DataFrame(
        [
            {
                "layer": layer.name,
                "block": layer.block,
                "kind": layer.name.rpartition(".")[2],
                "rows": layer.shape[0],
                "columns": layer.shape[1],
                **{column: facts.get(layer.name, {}).get(column) for column in columns},
            }
            for layer in layers
        ],
        columns=[*IDENTITY, *columns],
    )
