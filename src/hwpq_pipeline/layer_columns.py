"""The columns of the layer tables: what `select` and `compress` tell of each layer (facts, layer stats).

`pipelines.tables` makes the tables by this list, and `schemas` checks them by it. How a column is shown stands apart,
in `figures.LAYER_FIGURES`: a changed label then makes no compression stale.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a layer table.

    Attributes:
        name: of the column.
        kind: `str`, `int` or `float`.
        nullable: whether it is missing where it does not apply.
        least, most: the range of its numbers, ends included; None is no bound.
        unique: whether no value comes twice.
    """

    name: str
    kind: type = float
    nullable: bool = True
    least: float | None = None
    most: float | None = None
    unique: bool = False


IDENTITY = (
    Column("layer", str, nullable=False, unique=True),
    Column("block", int, nullable=False, least=0),
    Column("kind", str, nullable=False),
    Column("rows", int, nullable=False, least=1),
    Column("columns", int, nullable=False, least=1),
)
#: Of `select`. Contributions (saliency) are in the metric's own unit: the quantiles at 1, 50 and 99 %, and where the
#: moving average runs (`compression.ewma`) its mean, its deviation and the multiplier λ.
SELECTED = (
    Column("metric", str),
    Column("contribution_q01", least=0),
    Column("contribution_q50", least=0),
    Column("contribution_q99", least=0),
    Column("mean"),
    Column("deviation"),
    Column("multiplier"),
    Column("wanted_sparsity", least=0, most=1),
    Column("reached_sparsity", nullable=False, least=0, most=1),
)
#: Of `compress`: relative squared output errors ‖(W − W₀)X‖² / ‖W₀X‖² after each step.
COMPRESSED = (
    Column("error_pruned", least=0),
    Column("error_recovered", least=0),
    Column("error_quantized", least=0),
)


def names(columns: tuple[Column, ...]) -> list[str]:
    """The names, in order."""
    return [column.name for column in columns]
