"""A variant that could not be made becomes a FAILED run: people see it beside the others, and it counts as none."""

from __future__ import annotations

import hashlib

from .connection import connected, reason
from .runs import FAILURE, experiment_of, git_tags

FAILURE_KEY = "hwpq.failure"


def log_failure(variant: str, stage: str, error: BaseException, *, experiment: str, tracking_uri: str) -> str:
    """Log that a stage of a variant failed. The same failure is logged once.

    Args:
        variant: its name.
        stage: the node that failed.
        error: why.
        experiment: name of the MLflow experiment.
        tracking_uri: as `resolve_uri` gives it.

    Returns:
        The id of the run.

    Raises:
        HwpqError: the server cannot be reached or refuses.
    """
    why = f"{stage}: {reason(error, tracking_uri)}"
    key = hashlib.sha256(f"{variant}\n{why}".encode()).hexdigest()
    with connected(tracking_uri) as client:
        experiment_id = experiment_of(client, experiment, tracking_uri)
        if known := client.search_runs([experiment_id], f"tags.`{FAILURE_KEY}` = '{key}'", max_results=1):
            return str(known[0].info.run_id)
        tags = {
            FAILURE_KEY: key, FAILURE: why, "variant": variant, "mlflow.note.content": f"**Failed** in {why}",
            **git_tags(),
        }  # fmt: skip
        run = client.create_run(experiment_id, run_name=variant, tags=tags)
        client.set_terminated(run.info.run_id, "FAILED")
        return str(run.info.run_id)
