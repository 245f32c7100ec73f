"""Quality gates: limits that a variant's figures (metrics) must keep.

A gate is for CI: it turns "is this still good enough to ship?" into an exit status. It looks at what was measured and
changes nothing, so a variant that misses a limit is still on disk, in MLflow and in the report. The field `gate` in
`figures` says which figures have a limit, and what it is called. A variant whose figures are not whole fails, with or
without a limit: what was not measured is not good enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.figures import GATED, values

WHERE = "quality_gates.yml"


def broken_gates(
    gates: Mapping[str, Mapping[str, float | None]], metrics: Mapping[str, Mapping[str, Any] | None]
) -> list[HwpqError]:
    """What does not hold, one error a variant and figure.

    Args:
        gates: limits by variant and by the names of `figures.GATED`; None is no limit.
        metrics: figures by variant, as in `metrics.json`. A figure that is not a number breaks every limit, and a
            variant that lacks a figure is broken.
    """
    broken = [
        HwpqError("no such variant", where=f"{WHERE}: variants.{variant}", remedy=f"Use one of {', '.join(metrics)}")
        for variant in gates
        if variant not in metrics
    ]
    for variant, measured in metrics.items():
        try:
            found = values(measured, where=f"metrics of {variant}")
        except HwpqError as error:
            broken.append(error)
            continue
        broken += _missed(variant, gates.get(variant, {}), found)
    return broken


def _missed(variant: str, limits: Mapping[str, float | None], found: Mapping[str, float]) -> list[HwpqError]:
    """The limits that a variant's figures do not keep."""
    broken = []
    for figure in GATED:
        bound, value, low = limits.get(figure.limit), found[figure.name], figure.better == "lower"
        if bound is None or (value <= bound if low else value >= bound):
            continue
        broken.append(
            HwpqError(
                f"{figure.name} is {_shown(value)}, {'above' if low else 'below'} {figure.limit} {_shown(bound)}",
                where=f"quality gate, {variant}",
                remedy=f"Improve the variant, or change the limit in {WHERE}",
            )
        )
    return broken


def count_gates(gates: Mapping[str, Mapping[str, float | None]]) -> int:
    """How many limits are set."""
    return sum(limits.get(figure.limit) is not None for limits in gates.values() for figure in GATED)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
