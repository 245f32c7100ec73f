"""The tables between pipelines, checked by the catalog on load and on save (`validator:`)."""

from __future__ import annotations

import pandas as pd
import pandera.pandas as pa
from pandera.typing.pandas import Series


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


class _Layers(_Table):
    layer: Series[str] = pa.Field(unique=True)
    block: Series[int] = pa.Field(ge=0)
    kind: Series[str]
    rows: Series[int] = pa.Field(ge=1)
    columns: Series[int] = pa.Field(ge=1)


class SelectedLayers(_Layers):
    """What `select` did, a row a layer. Contributions are in the metric's own unit; NaN where none applies."""

    metric: Series[str] = pa.Field(nullable=True)
    contribution_q01: Series[float] = pa.Field(nullable=True, ge=0)
    contribution_q50: Series[float] = pa.Field(nullable=True, ge=0)
    contribution_q99: Series[float] = pa.Field(nullable=True, ge=0)
    mean: Series[float] = pa.Field(nullable=True)
    deviation: Series[float] = pa.Field(nullable=True)
    multiplier: Series[float] = pa.Field(nullable=True)
    wanted_sparsity: Series[float] = pa.Field(nullable=True, ge=0, le=1)
    reached_sparsity: Series[float] = pa.Field(ge=0, le=1)


class CompressedLayers(_Layers):
    """What `compress` did, a row a layer: relative squared output errors ‖(W−W₀)X‖²/‖W₀X‖²."""

    error_pruned: Series[float] = pa.Field(nullable=True, ge=0)
    error_recovered: Series[float] = pa.Field(nullable=True, ge=0)
    error_quantized: Series[float] = pa.Field(nullable=True, ge=0)


class Layers(SelectedLayers):
    """The report's table: what `select` and `compress` did to each layer."""

    error_pruned: Series[float] = pa.Field(nullable=True, ge=0)
    error_recovered: Series[float] = pa.Field(nullable=True, ge=0)
    error_quantized: Series[float] = pa.Field(nullable=True, ge=0)


class Comparison(_Table):
    """The variants side by side, a row a variant."""

    variant: Series[str] = pa.Field(unique=True)
    perplexity: Series[float] = pa.Field(gt=0)
    perplexity_ratio: Series[float] = pa.Field(gt=0)
    kl_divergence: Series[float]
    top1_agreement: Series[float] = pa.Field(ge=0, le=1)
    sparsity: Series[float] = pa.Field(ge=0, le=1)
    size_bytes: Series[int] = pa.Field(gt=0)
    compression_ratio: Series[float] = pa.Field(gt=0)
    seconds: Series[float] = pa.Field(ge=0)
