"""What a test finds in an MLflow store."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import Run


def logged_runs(uri: str, experiment: str = "hwpq", only: str = "") -> list[Run]:
    """The runs of an experiment, newest first; `only` is a filter in MLflow's language."""
    client = MlflowClient(uri)
    return list(client.search_runs([experiment_id(uri, experiment)], only))


def experiment_id(uri: str, experiment: str = "hwpq") -> str:
    """The id of an experiment that must be there."""
    found = MlflowClient(uri).get_experiment_by_name(experiment)
    assert found is not None, f"{uri} has no experiment {experiment}"
    return str(found.experiment_id)
