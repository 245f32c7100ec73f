"""The node that fails a run whose variants are not good enough."""

from __future__ import annotations

import logging
from typing import Any

from hwpq_pipeline.pipelines.variants import by_variant
from hwpq_pipeline.reporting.gates import broken_gates, count_gates

from .limits import QualityGates

logger = logging.getLogger(__name__)


def check(quality_gates: QualityGates, **metrics: dict[str, Any]) -> None:
    """Check every variant's figures against its limits.

    Args:
        quality_gates: the limits.
        metrics: of each variant, keyed as `by_variant` reads them.

    Raises:
        ExceptionGroup: of HwpqError, one for each limit that does not hold and each variant that lacks a figure.
    """
    gates = quality_gates.limits()
    figures = by_variant(metrics, "metrics")
    if broken := broken_gates(gates, figures):
        raise ExceptionGroup("quality gates", broken)
    logger.info("All %d quality gates of %d variants hold.", count_gates(gates), len(gates))
    if free := [name for name in figures if name not in gates]:
        logger.warning("No quality gate for %s.", ", ".join(free))
