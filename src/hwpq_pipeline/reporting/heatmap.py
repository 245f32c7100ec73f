"""Heat maps as inline SVG: a row is a kind of layer, a column is a decoder block."""

from __future__ import annotations

import math
from html import escape

import pandas as pd

CELL, HEAD = 11, 74


def heatmap(layers: pd.DataFrame, column: str, *, low: float, high: float, logarithmic: bool) -> str:
    """Draw the map as an `<svg>` element. It is empty where the column has no value.

    Args:
        layers: the layer table: `block`, `kind`, and the column.
        column: the one to show; its values are at or above zero.
        low: the value of the first colour; above zero if logarithmic.
        high: the value of the last colour.
        logarithmic: whether colours follow the logarithm; zero then has the first colour.
    """
    known = layers[layers[column].notna()]
    if known.empty:
        return ""
    kinds = list(known["kind"].drop_duplicates())
    width = HEAD + CELL * (int(known["block"].max()) + 1)
    parts = [f'<svg class="map" viewBox="0 0 {width} {CELL * len(kinds)}" role="img" aria-label="{escape(column)}">']
    for row, kind in enumerate(kinds):
        y = CELL * row
        parts.append(f'<text class="tick" x="{HEAD - 6}" y="{y + 9}" text-anchor="end">{escape(str(kind))}</text>')
        for block, value in known.loc[known["kind"] == kind, ["block", column]].itertuples(index=False):
            share = place(float(value), low, high, logarithmic=logarithmic)
            title = f"{escape(str(kind))}, block {block}: {value:.3g}"
            parts.append(
                f'<rect x="{HEAD + CELL * int(block)}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{colour(share)}"><title>{title}</title></rect>'
            )
    return "".join([*parts, "</svg>"])


def place(value: float, low: float, high: float, *, logarithmic: bool) -> float:
    """Where a value lies between low and high, 0 to 1."""
    if logarithmic:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def colour(share: float) -> str:
    """A colour of matplotlib's `cividis`, which people with colour blindness tell apart, dark to bright."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["cividis"](share))


def gradient() -> str:
    """The same colours as a CSS gradient, for a legend."""
    return f"linear-gradient(90deg,{','.join(colour(step / 8) for step in range(9))})"
