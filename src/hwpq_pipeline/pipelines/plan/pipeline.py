"""dense model, configuration → what each stage takes: memory, disk, seconds.

The report shows it beside what was measured. Nothing is held to this file: a run that cannot fit is refused by what it
would take then (`project.ProjectHooks`).
"""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from .nodes import plan


def create_pipeline() -> Pipeline:
    """One node for all variants."""
    return Pipeline(
        [
            node(
                plan,
                [
                    "model",
                    "params:variants",
                    "params:calibration",
                    "params:evaluation",
                    "params:export",
                    "params:report",
                    "params:compute",
                ],
                "plan",
                name="plan_run",
            )
        ]
    )
