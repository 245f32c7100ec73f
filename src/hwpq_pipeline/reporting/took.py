"""What each stage took beside what was planned: the tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwpq_pipeline.measuring import DISK, GPU, MEMORY, SECONDS

#: Of a table where nothing was planned, or measured.
_NONE = "–"


@dataclass(frozen=True)
class Cost:
    """One thing that a stage takes.

    Attributes:
        planned: its name in the plan (`planning.Need`).
        measured: its name in `metrics.json`.
        label: what people read, with the unit.
        divisor, format: from the number to what is shown.
    """

    planned: str
    measured: str
    label: str
    divisor: float
    format: str

    def show(self, value: float | None) -> str:
        """The number as people read it."""
        return _NONE if value is None else f"{value / self.divisor:{self.format}}"


SHOWN = (
    Cost("memory", MEMORY, "peak memory, GB", 1e9, ".2f"),
    Cost("gpu", GPU, "peak GPU memory, GB", 1e9, ".2f"),
    Cost("disk", DISK, "disk, MB", 1e6, ".1f"),
    Cost("seconds", SECONDS, "seconds", 1, ".0f"),
)


@dataclass(frozen=True)
class Took:
    """The tables of one run.

    Attributes:
        heads: of the pairs of columns, planned and measured.
        tables: a title and its rows: the stage, then planned and measured of each.
    """

    heads: tuple[str, ...]
    tables: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]


def what_it_took(plan: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]]) -> Took:
    """A table of the stages that all variants share, and one for each variant.

    Args:
        plan: the planned stages, by the names of `planning.Need`.
        metrics: of each variant, as in its `metrics.json`.
    """
    used = any(GPU in found for found in metrics.values())
    costs = [cost for cost in SHOWN if used or cost.measured != GPU]
    planned = {(need["variant"], need["stage"]): need for need in plan}
    shared = [stage for variant, stage in planned if variant is None]
    some: Mapping[str, Any] = next(iter(metrics.values()), {})
    tables = [("once, for all variants", _rows(planned, None, some, shared, costs))]
    for name, found in metrics.items():
        stages = [stage for stage in found.get(SECONDS, {}) if stage not in shared]
        tables.append((name, _rows(planned, name, found, stages, costs)))
    return Took(tuple(cost.label for cost in costs), tuple(tables))


def _rows(
    planned: Mapping[tuple[str | None, str], Mapping[str, Any]],
    variant: str | None,
    measured: Mapping[str, Any],
    stages: Sequence[str],
    costs: Sequence[Cost],
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for stage in stages:
        need, cells = planned.get((variant, stage), {}), [stage]
        for cost in costs:
            cells += [cost.show(need.get(cost.planned)), cost.show(measured.get(cost.measured, {}).get(stage))]
        rows.append(tuple(cells))
    return tuple(rows)
