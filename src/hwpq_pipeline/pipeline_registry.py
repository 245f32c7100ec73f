"""The pipelines that `kedro run --pipelines` knows. The default is all of them but `gate`."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from hwpq_pipeline.pipelines import (
    calibrate,
    compress,
    evaluate,
    export,
    fetch,
    gate,
    plan,
    prompts,
    publish,
    recipes,
    reference,
    report,
    select,
    track,
)
from hwpq_pipeline.project import variant_names


def register_pipelines() -> dict[str, Pipeline]:
    """Pipelines by name. Those that run for each variant have a namespace for each entry of the configuration."""
    names = variant_names()
    pipelines = {
        "fetch": fetch.create_pipeline(),
        "plan": plan.create_pipeline(),
        "calibrate": calibrate.create_pipeline(),
        "reference": reference.create_pipeline(),
        "recipes": recipes.create_pipeline(names),
        "select": select.create_pipeline(names),
        "compress": compress.create_pipeline(names),
        "export": export.create_pipeline(names),
        "evaluate": evaluate.create_pipeline(names),
        "prompts": prompts.create_pipeline(names),
        "publish": publish.create_pipeline(names),
        "report": report.create_pipeline(names),
        "track": track.create_pipeline(names),
    }
    return {
        **pipelines,
        "__default__": sum(pipelines.values(), Pipeline([])),
        # Runs by name only: those who try variants out want their figures, good or bad, and no failed run.
        "gate": gate.create_pipeline(names),
    }
