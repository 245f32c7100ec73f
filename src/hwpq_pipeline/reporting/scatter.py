"""A scatter plot as inline SVG: quality on a logarithmic axis, worse upwards, against a cost on a linear one.

It is SVG in the page and no picture: it takes the page's colours in the dark, it stays sharp on a phone, and its points
say their figures when they are touched. A label takes the first free place around its point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
LETTER = 6.4  # width of a letter of a label, in units of the picture
_STEPS = (1, 2, 2.5, 5)
_RATIOS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A variant: its name, its cost in the axis's unit, its perplexity as a multiple of dense."""

    name: str
    x: float
    y: float


def scatter(points: Sequence[Point], *, across: str, down: str) -> str:
    """Draw the plot as an `<svg>` element.

    Args:
        points: one for each variant; ratios above zero.
        across: the label of the axis of costs.
        down: the label of the axis of quality.
    """
    low, high = min(point.x for point in points), max(point.x for point in points)
    span = (high - low) or max(high, 1.0)
    x0, x1 = max(0.0, low - 0.12 * span), high + 0.12 * span
    y0, y1 = math.log(min(point.y for point in points)), math.log(max(point.y for point in points))
    margin = 0.08 * (y1 - y0) or 0.1
    y0, y1 = y0 - margin, y1 + margin

    def x_of(value: float) -> float:
        return LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y_of(ratio: float) -> float:
        return HEIGHT - BOTTOM - (math.log(ratio) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(down)} against {escape(across)}">']
    for ratio in _ratios(math.exp(y0), math.exp(y1)):
        y = y_of(ratio)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{ratio:g}×</text>')
    for value in ticks(x0, x1):
        x = x_of(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>')
    places = [(x_of(point.x), y_of(point.y)) for point in points]
    for point, (x, y), (tx, ty) in zip(points, places, place_labels(points, places), strict=True):
        words = escape(f"{point.name}. {down}: {point.y:.3f}. {across}: {point.x:.1f}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{words}</title></circle>')
        parts.append(f'<text class="name" x="{tx:.1f}" y="{ty:.1f}">{escape(point.name)}</text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round values between the two."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next((unit * power for unit in _STEPS if (high - low) / (unit * power) <= 7), 10 * power)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _ratios(low: float, high: float) -> list[float]:
    found = [ratio for ratio in _RATIOS if low <= ratio <= high]
    return found if len(found) > 1 else [float(f"{low:.3g}"), float(f"{high:.3g}")]


def place_labels(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The left ends of the labels' baselines: for each the first place that covers no point and no earlier label."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    found = []
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        width = LETTER * len(point.name)
        tries = [
            (x + dx - back * width, y + dy)
            for dy in (4, -9, 17, -21, 29)
            for dx, back in ((9, 0.0), (-9, 1.0), (0, 0.5))
            if not (dy == 4 and back == 0.5)
        ]
        others = taken[:index] + taken[index + 1 :]
        best = next((place for place in tries if _free(_box(place, width), others)), tries[0])
        taken.append(_box(best, width))
        found.append(best)
    return found


def _box(place: tuple[float, float], width: float) -> Box:
    return place[0], place[1] - 9, place[0] + width, place[1] + 2


def _free(box: Box, others: Sequence[Box]) -> bool:
    inside = box[0] >= LEFT + 2 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in others
    )
