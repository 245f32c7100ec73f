"""The layer table: what a pipeline did, a row for each layer, in module order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.layer_columns import IDENTITY, Column, names


def layer_table(
    layers: Iterable[Layer], facts: Mapping[str, Mapping[str, Any]], columns: tuple[Column, ...]
) -> pd.DataFrame:
    """Make a table of `layers` with the `columns` of `facts`. What a layer's facts lack is missing in its row.

    Args:
        layers: in the order of the rows.
        facts: by layer name.
        columns: to take from the facts, in this order.
    """
    told = names(columns)
    return pd.DataFrame(
        [
            {
                "layer": layer.name,
                "block": layer.block,
                "kind": layer.name.rpartition(".")[2],
                "rows": layer.shape[0],
                "columns": layer.shape[1],
                **{column: facts.get(layer.name, {}).get(column) for column in told},
            }
            for layer in layers
        ],
        columns=[*names(IDENTITY), *told],
    )
