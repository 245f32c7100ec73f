"""The report as one HTML page: no script, no request, readable on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hwpq_pipeline.figures import ERRORS, FIGURES, QUALITY, REACHED, SIZE, TIME, Figure, LayerFigure, cells

from .comparison import TITLE, records
from .front import verdict
from .heatmap import gradient, heatmap
from .scatter import Point, scatter
from .took import Took

#: The errors that are drawn: the last is that of the export, the first that of pruning alone.
MAPS = (ERRORS[-1], ERRORS[0])


@dataclass(frozen=True)
class Reported:
    """What the page tells of one variant.

    Attributes:
        name: of the variant.
        description: in words.
        entry: its entry of the configuration, as YAML.
        recipe: the same with every number written out, those of presets and defaults included, as YAML.
        layers: the layer table.
        continuations: `prompt` and `continuation`, the same prompts in each.
        command: the one that makes it again.
    """

    name: str
    description: str
    entry: str
    recipe: str
    layers: pd.DataFrame
    continuations: Sequence[Mapping[str, str]]
    command: str


def render(comparison: pd.DataFrame, variants: Sequence[Reported], *, conditions: Mapping[str, Any], took: Took) -> str:
    """Make the page.

    Args:
        comparison: as `comparison_table` makes it.
        variants: in the order of the page.
        conditions: what the figures depend on, by name: tokens, seeds.
        took: what each stage took, beside what was planned.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("hwpq_pipeline", "reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    low, high = _error_range(variants)
    rows = records(comparison)
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        figures=FIGURES,
        rows=[(row["variant"], cells(row)) for row in rows],
        conditions=conditions,
        verdict=verdict(rows),
        quality=QUALITY,
        plots=[(cost, Markup(_scatter(rows, cost))) for cost in (SIZE, TIME)],  # noqa: S704 - our own SVG, escaped in it
        prompts=_side_by_side(variants),
        maps=[(item.name, [(label, Markup(svg)) for label, svg in _maps(item, low, high)]) for item in variants],  # noqa: S704
        gradient=Markup(gradient()),  # noqa: S704
        low=f"{low:.2g}",
        high=f"{high:.2g}",
        variants=variants,
        took=took,
    )


def _scatter(rows: Sequence[Mapping[str, Any]], cost: Figure) -> str:
    points = [Point(row["variant"], float(row[cost.name]) / cost.divisor, float(row[QUALITY.name])) for row in rows]
    return scatter(points, across=cost.label, down=QUALITY.label)


def _error_range(variants: Sequence[Reported]) -> tuple[float, float]:
    """Least and greatest error above zero, over all maps: one scale makes variants comparable."""
    columns = [error.column for error in MAPS]
    values = np.concatenate([item.layers[columns].to_numpy(float).ravel() for item in variants])
    values = values[values > 0]  # NaN is not
    return (float(values.min()), float(values.max())) if values.size else (1e-6, 1.0)


def _maps(item: Reported, low: float, high: float) -> list[tuple[str, str]]:
    """Label and SVG of each map that has anything to show."""

    def drawn(shown: LayerFigure, least: float, most: float, *, logarithmic: bool) -> tuple[str, str]:
        return shown.label, heatmap(item.layers, shown.column, low=least, high=most, logarithmic=logarithmic)

    maps = [drawn(error, low, high, logarithmic=True) for error in MAPS if (item.layers[error.column] > 0).any()]
    if (item.layers[REACHED.column] > 0).any():
        label, svg = drawn(REACHED, 0.0, 1.0, logarithmic=False)
        maps.append((f"{label}, 0 to 1", svg))
    return maps


def _side_by_side(variants: Sequence[Reported]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt, with what every variant made of it."""
    prompts = [entry["prompt"] for entry in variants[0].continuations] if variants else []
    return [
        (prompt, [(item.name, item.continuations[index]["continuation"]) for item in variants])
        for index, prompt in enumerate(prompts)
    ]
