"""Quality gates: limits that a variant's figures must keep.

A gate is for CI: it turns "is this still good enough to ship?" into an exit status. It looks at what was measured and
changes nothing, so that a variant that misses is still on disk, in MLflow and in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwpq_pipeline.errors import HwpqError

#: Limit, the figure of `metrics.json` that it is on, whether it is a maximum.
LIMITS = (
    ("maximum_perplexity_ratio", "perplexity_ratio", True),
    ("minimum_top1_agreement", "top1_agreement", False),
    ("maximum_bytes", "size_bytes", True),
)
WHERE = "quality_gates.yml"


def broken_gates(
    gates: Mapping[str, Mapping[str, float | None]], metrics: Mapping[str, Mapping[str, Any]]
) -> list[HwpqError]:
    """What does not hold, one error a variant and figure.

    Args:
        gates: limits by variant and by the names in `LIMITS`; None is no limit.
        metrics: figures by variant, as in `metrics.json`. A figure that is not a number keeps no limit.
    """
    broken = []
    for variant, limits in gates.items():
        if variant not in metrics:
            broken.append(
                HwpqError(
                    "no such variant", where=f"{WHERE}: variants.{variant}", remedy=f"Use one of {', '.join(metrics)}"
                )
            )
            continue
        for limit, figure, is_maximum in LIMITS:
            bound = limits.get(limit)
            value = metrics[variant][figure]
            if bound is None or (value <= bound if is_maximum else value >= bound):
                continue
            broken.append(
                HwpqError(
                    f"{figure} is {_shown(value)}, {'above' if is_maximum else 'below'} {limit} {_shown(bound)}",
                    where=f"quality gate, {variant}",
                    remedy=f"Improve the variant, or change the limit in {WHERE}",
                )
            )
    return broken


def count_gates(gates: Mapping[str, Mapping[str, float | None]]) -> int:
    """How many limits are set."""
    return sum(limits.get(limit) is not None for limits in gates.values() for limit, _, _ in LIMITS)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
