"""The report as one HTML page: no script, no request, readable on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .heatmap import gradient, heatmap
from .scatter import Point, scatter

ERRORS = (("error_quantized", "output error, as exported"), ("error_pruned", "output error, pruned only"))
COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("perplexity_ratio", "× dense", "{:.3f}"),
    ("kl_divergence", "KL, nats", "{:.4f}"),
    ("top1_agreement", "top-1 agreement", "{:.1%}"),
    ("sparsity", "sparsity", "{:.1%}"),
    ("size_bytes", "MB on disk", "{:.1f}"),
    ("compression_ratio", "× smaller", "{:.2f}"),
    ("seconds", "seconds to make", "{:.0f}"),
)


@dataclass(frozen=True)
class Reported:
    """What the page tells of one variant.

    Attributes:
        name: of the variant.
        description: in words.
        recipe: its entry of the configuration, as YAML.
        layers: the layer table.
        continuations: `prompt` and `continuation`, the same prompts in each.
        command: that makes it again.
    """

    name: str
    description: str
    recipe: str
    layers: pd.DataFrame
    continuations: Sequence[Mapping[str, str]]
    command: str


def render(comparison: pd.DataFrame, variants: Sequence[Reported], *, conditions: Mapping[str, Any]) -> str:
    """The page.

    Args:
        comparison: a row a variant: `variant` and the columns of `COLUMNS`.
        variants: in the order of the page.
        conditions: what the figures depend on, by name: tokens, seeds.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("hwpq_pipeline", "reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    low, high = _error_range(variants)
    rows = [{str(name): value for name, value in row.items()} for row in comparison.to_dict("records")]
    return environment.get_template("page.html.j2").render(
        heads=[head for _, head, _ in COLUMNS],
        rows=[(row["variant"], [_cell(row, column, form) for column, _, form in COLUMNS]) for row in rows],
        conditions=conditions,
        by_size=Markup(_scatter(rows, "size_bytes", 1e-6, "MB on disk")),  # noqa: S704 - our own SVG, escaped in it
        by_time=Markup(_scatter(rows, "seconds", 1, "seconds to make, calibration included")),  # noqa: S704
        prompts=_side_by_side(variants),
        maps=[(item.name, [(label, Markup(svg)) for label, svg in _maps(item, low, high)]) for item in variants],  # noqa: S704
        gradient=Markup(gradient()),  # noqa: S704
        low=f"{low:.2g}",
        high=f"{high:.2g}",
        variants=variants,
    )


def _cell(row: Mapping[str, Any], column: str, form: str) -> str:
    return form.format(row[column] / 1e6 if column == "size_bytes" else row[column])


def _scatter(rows: Sequence[Mapping[str, Any]], column: str, unit: float, label: str) -> str:
    points = [Point(str(row["variant"]), float(row[column]) * unit, float(row["perplexity_ratio"])) for row in rows]
    return scatter(points, label)


def _error_range(variants: Sequence[Reported]) -> tuple[float, float]:
    """Least and greatest error above zero, over all maps: one scale makes variants comparable."""
    columns = [column for column, _ in ERRORS]
    values = np.concatenate([item.layers[columns].to_numpy(float).ravel() for item in variants])
    values = values[values > 0]  # NaN is not
    return (float(values.min()), float(values.max())) if values.size else (1e-6, 1.0)


def _maps(item: Reported, low: float, high: float) -> list[tuple[str, str]]:
    maps = [
        (label, heatmap(item.layers, column, low=low, high=high, logarithmic=True))
        for column, label in ERRORS
        if (item.layers[column] > 0).any()
    ]
    if (item.layers["reached_sparsity"] > 0).any():
        maps.append(
            ("sparsity, 0 to 1", heatmap(item.layers, "reached_sparsity", low=0.0, high=1.0, logarithmic=False))
        )
    return maps


def _side_by_side(variants: Sequence[Reported]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A prompt, and what each variant made of it."""
    prompts = [entry["prompt"] for entry in variants[0].continuations] if variants else []
    return [
        (prompt, [(item.name, item.continuations[index]["continuation"]) for item in variants])
        for index, prompt in enumerate(prompts)
    ]
