"""The tables between pipelines, checked by the catalog on load and on save (`validator:`).

The columns of the layer tables stand in `layer_columns`, those of the comparison in `figures`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pandera.pandas as pa
from pandera.typing.pandas import Series

from hwpq_pipeline.figures import FIGURES
from hwpq_pipeline.layer_columns import COMPRESSED, IDENTITY, SELECTED, Column


class _Table(pa.DataFrameModel):
    class Config:
        strict = True
        coerce = True


class Documents(_Table):
    """The corpus, a row a document."""

    id: Series[int] = pa.Field(unique=True)
    title: Series[str]
    text: Series[str] = pa.Field(str_length={"min_value": 1})


class Samples(_Table):
    """Token samples, a row a sample; all of one length, none twice."""

    sample: Series[int] = pa.Field(unique=True, ge=0)
    document: Series[int] = pa.Field(ge=0)
    tokens: Series[object]

    @pa.dataframe_check(error="samples are not empty and of one length")
    @classmethod
    def _one_length(cls, table: pd.DataFrame) -> bool:
        lengths = table["tokens"].map(len).unique()
        return len(lengths) == 1 and int(lengths[0]) > 0


def _layers(columns: Iterable[Column]) -> pa.DataFrameSchema:
    """A layer table: a row a layer, exactly these columns."""
    return pa.DataFrameSchema(
        {
            column.name: pa.Column(
                column.kind,
                _bounds(column.least, column.most),
                nullable=column.nullable,
                unique=column.unique,
            )
            for column in columns
        },
        strict=True,
        coerce=True,
    )


def _comparison() -> pa.DataFrameSchema:
    """The variants side by side: a row a variant, a column a figure."""
    figures = {
        figure.name: pa.Column(
            int if figure.whole else float,
            [pa.Check.gt(0) if figure.positive else pa.Check.ge(0), *_bounds(None, figure.most)],
        )
        for figure in FIGURES
    }
    return pa.DataFrameSchema({"variant": pa.Column(str, unique=True), **figures}, strict=True, coerce=True)


def _bounds(least: float | None, most: float | None) -> list[pa.Check]:
    low = [] if least is None else [pa.Check.ge(least)]
    return low if most is None else [*low, pa.Check.le(most)]


#: What `select` did, and what `compress` did; the report's table holds both.
SelectedLayers = _layers([*IDENTITY, *SELECTED])
CompressedLayers = _layers([*IDENTITY, *COMPRESSED])
Layers = _layers([*IDENTITY, *SELECTED, *COMPRESSED])
Comparison = _comparison()
