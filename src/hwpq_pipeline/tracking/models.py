"""An export as an MLflow model: what `mlflow.transformers.load_model` and `mlflow models serve` take."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "model"
#: What loading an export needs; told, because MLflow would load the model to find out.
NEEDS = ("accelerate", "compressed-tensors", "torch", "transformers")


def log_checkpoint(client: MlflowClient, run_id: str, checkpoint: Path) -> None:
    """Log a checkpoint as the run's artifact `model`, unless it is there.

    Args:
        client: of the store.
        run_id: of the run.
        checkpoint: a directory that transformers loads.
    """
    import mlflow.transformers

    if any(artifact.path == f"{NAME}/MLmodel" for artifact in client.list_artifacts(run_id, NAME)):
        return
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / NAME
        mlflow.transformers.save_model(
            transformers_model=str(checkpoint),
            path=str(target),
            task="text-generation",
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDS],
        )
        client.log_artifacts(run_id, str(target), NAME)
