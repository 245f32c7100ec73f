"""The pipelines that `kedro run --pipelines` knows; all but `gate` together are the default."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from hwpq_pipeline.pipelines import (
    calibrate,
    compress,
    evaluate,
    export,
    fetch,
    gate,
    publish,
    recipes,
    reference,
    report,
    select,
    track,
)
from hwpq_pipeline.project import variant_names


def register_pipelines() -> dict[str, Pipeline]:
    """Pipelines by name, those a variant with a namespace for each entry of the configuration."""
    names = variant_names()
    pipelines = {
        "fetch": fetch.create_pipeline(),
        "calibrate": calibrate.create_pipeline(),
        "reference": reference.create_pipeline(),
        "recipes": recipes.create_pipeline(names),
        "select": select.create_pipeline(names),
        "compress": compress.create_pipeline(names),
        "export": export.create_pipeline(names),
        "evaluate": evaluate.create_pipeline(names),
        "publish": publish.create_pipeline(names),
        "track": track.create_pipeline(names),
        "report": report.create_pipeline(names),
    }
    return {
        **pipelines,
        "__default__": sum(pipelines.values(), Pipeline([])),
        # Asked for by name: whoever tries variants out wants their figures, good or bad, and no failed run.
        "gate": gate.create_pipeline(names),
    }
