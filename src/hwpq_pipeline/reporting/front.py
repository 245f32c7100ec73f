"""The front of quality against size: the variants that no other one beats in both. Whether a sparse one is on it.

It is the first thing that the report says, because it tells whether pruning pays for this model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwpq_pipeline.figures import QUALITY, SIZE

#: From this share of zeros on a variant counts as sparse. Rounding alone makes a fourth at 3 bits.
SPARSE = 0.4
#: Sizes that differ by less than this factor are the same: headers and checksums do.
SAME = 1.005
Row = Mapping[str, Any]


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats: none is as small and as good, and smaller or better. In order of size."""
    best = [row for row in rows if not any(_beats(other, row) for other in rows)]
    return sorted(best, key=lambda row: row[SIZE.name])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: the sparse variants on the front, or how far the nearest one is from it; none without any.

    How far: its perplexity over the best of all variants that are no larger.
    """
    sparse = [row for row in rows if row["sparsity"] >= SPARSE]
    if not sparse:
        return ""
    if on_it := [row for row in front(rows) if row in sparse]:
        names = " and ".join(_told(row) for row in on_it)
        return f"On the front of quality against size, of the sparse variants: {names}."
    best = {row["variant"]: min((one for one in rows if _as_small(one, row)), key=_quality) for row in sparse}
    row = min(sparse, key=lambda one: _quality(one) / _quality(best[one["variant"]]))
    other = best[row["variant"]]
    return (
        f"No sparse variant is on the front of quality against size. The nearest lacks a factor of "
        f"{_quality(row) / _quality(other):.2f}: {_told(row)}, and {_told(other)}."
    )


def _beats(one: Row, other: Row) -> bool:
    smaller = one[SIZE.name] * SAME < other[SIZE.name]
    return _as_small(one, other) and _quality(one) <= _quality(other) and (smaller or _quality(one) < _quality(other))


def _as_small(one: Row, other: Row) -> bool:
    return bool(one[SIZE.name] <= other[SIZE.name] * SAME)


def _quality(row: Row) -> float:
    return float(row[QUALITY.name])


def _told(row: Row) -> str:
    quality, size = QUALITY.show(row[QUALITY.name]), SIZE.show(row[SIZE.name])
    return f"{row['variant']} has {quality} × the dense perplexity in {size} MB"
