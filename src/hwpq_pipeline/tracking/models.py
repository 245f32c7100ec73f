"""The exported model as an MLflow model of its run. `mlflow.transformers` loads it, `mlflow models serve` serves it.

The export is stored as it is: its files are copied, and nothing is loaded, decompressed or pickled. MLflow writes a
description beside them (`MLmodel`) with the task `llm/v1/completions`, so its server answers as OpenAI's completions
do. A run's key fixes its export. So storing a model twice changes nothing, and a model may be added to a run that was
logged without one. A tag says that the model is whole. It is the tag by which the MLflow UI finds a run's models.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.processes import temporary_folder

from .connection import connected

if TYPE_CHECKING:
    from mlflow.models import Model

PLACE = "model"
TASK = "llm/v1/completions"
HISTORY = "mlflow.log-model.history"
PACKAGES = ("accelerate", "compressed-tensors", "torch", "transformers")


def log_model(run_id: str, export: Path, name: str, *, tracking_uri: str) -> bool:
    """Store an export as the model `runs:/<run_id>/model`, unless the run has it.

    Args:
        run_id: the run, as `log_once` gave it.
        export: the checkpoint's directory.
        name: the one under which the model answers.
        tracking_uri: as `resolve_uri` gives it.

    Returns:
        Whether it was stored now.

    Raises:
        HwpqError: the server cannot be reached or refuses.
    """
    with connected(tracking_uri) as client:
        if HISTORY in client.get_run(run_id).data.tags:
            return False
        with temporary_folder(Path(tempfile.gettempdir()), "mlflow-model-") as folder:
            model = save_model(export, folder / PLACE, name, run_id=run_id)
            client.log_artifacts(run_id, str(folder / PLACE), PLACE)
        client.set_tag(run_id, HISTORY, json.dumps([model.get_tags_dict()]))
        return True


def save_model(export: Path, to: Path, name: str, *, run_id: str | None = None) -> Model:
    """Write an export as an MLflow model.

    Args:
        export: the checkpoint's directory, with its model card `README.md`.
        to: the directory to make.
        name: the one under which the model answers.
        run_id: the run that it belongs to.

    Returns:
        The description that was written.
    """
    import mlflow.transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model

    with quiet_transformers(), _task_as_a_class():
        mlflow.transformers.save_model(
            transformers_model=str(export.resolve()),
            path=to,
            task=TASK,
            model_card=ModelCard.load(export / "README.md"),
            # What the checkpoint needs; MLflow would ask for all that transformers ever may.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in PACKAGES],
        )
    # A notice that looks the licence up on a hub by this machine's path; the model card names it.
    (to / "LICENSE.txt").unlink(missing_ok=True)
    model = Model.load(to)
    model.flavors["transformers"]["source_model_name"] = name  # was this machine's path
    model.artifact_path = PLACE
    model.run_id = run_id
    model.save(to / "MLmodel")
    return model


@contextmanager
def _task_as_a_class() -> Iterator[None]:
    """Let MLflow 3.17 find the pipeline's class. The registry of transformers 5.23 keeps its dotted name.

    An entry of the registry may be either: `PIPELINE_REGISTRY.register_pipeline` takes a class.
    """
    from transformers import TextGenerationPipeline, pipelines

    entry: dict[str, Any] = pipelines.check_task("text-generation")[1]
    before = entry["impl"]
    entry["impl"] = TextGenerationPipeline
    try:
        yield
    finally:
        entry["impl"] = before
