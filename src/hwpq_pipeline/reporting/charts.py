"""Charts of a report, as PNG files: errors and sparsity by layer, and variants against each other.

The colours are those of Okabe and Ito (2008). People with any common colour blindness can tell them apart. Line
styles and markers repeat the distinction for print in grey. Errors and perplexities span orders of magnitude, so
their axes are logarithmic. The same table gives the same bytes: the file holds no time and no library version, and no
label is placed at random.

The charts are drawn through `matplotlib.figure.Figure` and not through pyplot: there is no global state and no window,
and any thread may draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hwpq_pipeline.checkpoints.writer import atomic_file
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.figures import ERRORS, QUALITY, REACHED, SIZE, TIME, WANTED
from hwpq_pipeline.figures import Figure as Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito: blue, vermilion, green, orange, purple, sky, black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
_DPI = 110
#: Line widths of the errors, in the order of the steps: where curves lie on each other, the later one is thinner and on
#: top, so that both are seen.
_WIDTHS = dict(zip(ERRORS, (1.2, 3.4, 1.0), strict=True))


def error_by_layer(layers: pd.DataFrame, path: str | Path) -> Path:
    """Draw the relative output error of every layer after each step, a panel for each kind of layer.

    Args:
        layers: the layer table: `block`, `kind`, and the columns of `figures.ERRORS` (relative squared output errors,
            NaN where a step was not run).
        path: the PNG to write.

    Raises:
        HwpqError: a column is missing, or there is no layer.
    """
    _require(layers, ("block", "kind", *(error.column for error in ERRORS)))
    shown = [(index, error) for index, error in enumerate(ERRORS) if layers[error.column].gt(0).any()]
    if not shown:
        return _save(_nothing("No layer was changed, or no error is known."), path)
    figure, panels = _panels(layers)
    for panel, (kind, rows) in zip(panels, _kinds(layers), strict=True):
        for index, error in shown:
            values = rows[error.column].where(rows[error.column] > 0)  # a logarithmic axis has no place for zero
            panel.plot(rows["block"], values, color=COLOURS[index], marker=MARKERS[index], ms=3.4, lw=_WIDTHS[error],
                       label=error.label)  # fmt: skip
        panel.set_title(kind, fontsize=10)
        panel.set_yscale("log")
    _finish_panels(figure, panels, "Output error by layer:  ‖(W − W₀)X‖² / ‖W₀X‖²", "relative squared error")
    return _save(figure, path)


def sparsity_by_layer(layers: pd.DataFrame, path: str | Path) -> Path:
    """Draw the reached sparsity of every layer beside the wanted one, a panel for each kind of layer.

    Args:
        layers: the layer table: `block`, `kind`, `wanted_sparsity` (NaN where none was), `reached_sparsity`,
            0 to 1.
        path: the PNG to write.

    Raises:
        HwpqError: a column is missing, or there is no layer.
    """
    both = [REACHED.column, WANTED.column]
    _require(layers, ("block", "kind", *both))
    figure, panels = _panels(layers)
    for panel, (kind, rows) in zip(panels, _kinds(layers), strict=True):
        panel.plot(rows["block"], 100 * rows[REACHED.column], color=COLOURS[0], marker=MARKERS[0], ms=3.4,
                   lw=1.2, label=REACHED.label)  # fmt: skip
        if rows[WANTED.column].notna().any():
            panel.plot(rows["block"], 100 * rows[WANTED.column], color=COLOURS[1], ls="--", lw=1.4,
                       label=WANTED.label)  # fmt: skip
        panel.set_title(kind, fontsize=10)
    values = 100 * layers[both].to_numpy(float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(1.0, 0.1 * (high - low))  # a wanted sparsity is met to 0.1 %: a full axis would hide the rest
    panels[0].set_ylim(max(low - margin, -margin / 4), min(high + margin, 100 + margin / 4))
    _finish_panels(figure, panels, "Sparsity by layer", "zeros, %")
    return _save(figure, path)


def pareto(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw the variants' quality against their size, and against the seconds they took, a labelled point each.

    The line joins the variants that no other beats in both (lower is better on both axes).

    Args:
        table: `variant` and the columns of `figures.QUALITY`, `SIZE` and `TIME`.
        path: the PNG to write.

    Raises:
        HwpqError: a column is missing, or there is no variant.
    """
    from matplotlib.figure import Figure

    _require(table, ("variant", QUALITY.name, SIZE.name, TIME.name))
    figure = Figure(figsize=(12.5, 5.4), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, table, SIZE)
    _scatter(right, table, TIME)
    left.set_title("Quality against size", fontsize=11)
    right.set_title("Quality against time", fontsize=11)
    return _save(figure, path)


def quality_against(table: pd.DataFrame, cost: Metric, title: str, path: str | Path) -> Path:
    """Draw the variants' quality against one cost (lower is better), as `pareto` does.

    Args:
        table: `variant`, the column of `figures.QUALITY` and that of the cost.
        cost: what is on the other axis.
        title: of the chart.
        path: the PNG to write.

    Raises:
        HwpqError: a column is missing, or there is no variant.
    """
    from matplotlib.figure import Figure

    _require(table, ("variant", QUALITY.name, cost.name))
    figure = Figure(figsize=(7.0, 5.0), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    _scatter(axes, table, cost)
    axes.set_title(title, fontsize=11)
    return _save(figure, path)


def pareto_front(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> list[int]:
    """Indices of the points that no other beats (lower or equal in both, lower in one), by rising x.

    Args:
        x: shape (points,).
        y: shape (points,).
    """
    order = np.lexsort((y, x))
    front: list[int] = []
    best = np.inf
    for index in order:
        if y[index] < best:
            front.append(int(index))
            best = y[index]
    return front


def _scatter(axes: Axes, table: pd.DataFrame, cost: Metric) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    names = [str(name) for name in table["variant"]]
    x, y = table[cost.name].to_numpy(float) / cost.divisor, table[QUALITY.name].to_numpy(float)
    front = pareto_front(x, y)
    axes.plot(x[front], y[front], color=GREY, lw=1.2, ls="--", zorder=1, label="none is better in both")
    for index, name in enumerate(names):
        axes.scatter(x[index], y[index], s=62, color=COLOURS[index % 7], marker=MARKERS[index % 7],
                     zorder=3, edgecolor="white", lw=0.6, label="_" + name)  # fmt: skip
    axes.set_yscale("log")
    low, high = float(np.nanmin(y)), float(np.nanmax(y))
    axes.set_ylim(low / (high / low) ** 0.08 / 1.02, high * (high / low) ** 0.12 * 1.02)
    span = float(np.nanmax(x) - np.nanmin(x)) or float(np.nanmax(x)) or 1.0
    axes.set_xlim(float(np.nanmin(x)) - 0.06 * span, float(np.nanmax(x)) + 0.18 * span)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(_ticks(low, high))
    axes.set_xlabel(cost.label)
    axes.set_ylabel(f"{QUALITY.label} ({QUALITY.better} is better)")
    axes.grid(True, which="major", color="#DDDDDD", lw=0.7)
    axes.set_axisbelow(True)
    _label(axes, x, y, names)
    if len(front) > 1:
        axes.legend(loc="upper right", fontsize=9, frameon=False)


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios between the two: enough of them, whether they span 5 % or a factor of 40."""
    fine = [1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7]
    marks = [value * 10.0**power for power in range(4) for value in (fine if power == 0 else [1, 2, 3, 5, 7])]
    if high / low > 1.5:
        marks = [mark for mark in marks if mark in (1, 1.2, 1.5) or mark >= 2]
    return [mark for mark in marks if low / 1.05 <= mark <= high * 1.15] or [low, high]


def _label(axes: Axes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], names: Sequence[str]) -> None:
    """Name the points beside them, each at the first free place of eight around it."""
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # fixes the transform that the places are measured in
    points = axes.transData.transform(np.column_stack([x, y]))
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    taken = [(px - 6 * scale, py - 6 * scale, px + 6 * scale, py + 6 * scale) for px, py in points]
    for (px, py), name in zip(points, names, strict=True):
        width, height = 5.3 * len(name) * scale, 10 * scale
        places = [(9.0, -4.0, "left"), (-9.0, -4.0, "right"), (0.0, 9.0, "center"), (0.0, -18.0, "center"),
                  (8.0, 8.0, "left"), (8.0, -17.0, "left"), (-8.0, 8.0, "right"), (-8.0, -17.0, "right"),
                  (9.0, 20.0, "left"), (9.0, -30.0, "left")]  # fmt: skip
        for dx, dy, side in places:
            left = px + dx * scale - {"left": 0.0, "right": width, "center": width / 2}[side]
            box = (left, py + dy * scale, left + width, py + dy * scale + height)
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            dx, dy, side = places[0]
        taken.append(box)
        x_name, y_name = axes.transData.inverted().transform((px, py))
        axes.annotate(name, (x_name, y_name), (dx, dy), textcoords="offset points", ha=side, va="bottom",
                      fontsize=9, path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in table]:
        raise HwpqError(f"the table has no column {', '.join(missing)}", where="chart", remedy="Run the report again.")
    if table.empty:
        raise HwpqError("the table has no rows", where="chart", remedy="Run the pipelines before the chart.")


def _kinds(layers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Layers by kind, in the order in which the kinds come in a block."""
    kinds = layers["kind"].drop_duplicates()
    return [(str(kind), layers[layers["kind"] == kind].sort_values("block")) for kind in kinds]


def _panels(layers: pd.DataFrame) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    count = layers["kind"].nunique()
    across = min(count, 4)
    down = -(-count // across)
    figure = Figure(figsize=(3.2 * max(across, 2), 2.5 * down + 0.9), dpi=_DPI, layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for spare in grid[count:]:
        spare.remove()
    return figure, grid[:count]


def _finish_panels(figure: Figure, panels: list[Axes], title: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for panel in panels:
        panel.grid(True, color="#DDDDDD", lw=0.6)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.tick_params(labelsize=8, labelbottom=True)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("decoder block", fontsize=10)
    figure.supylabel(label, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


def _nothing(text: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2), dpi=_DPI)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, color=GREY)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
    return Path(path)
