"""One finished MLflow run for each variant and content.

A run's key is a digest of all that makes its figures: the variant's recipe, the exported weights, the evaluation tokens
and the figures themselves, without the seconds, which differ every time. The key is a tag. A variant whose key has a
FINISHED run is not logged again. So `kedro run`, `dvc repro` and a second `dvc repro` may all log, and a wiped database
is filled again.

A key fixes what is in a run, so writing into a run of that key twice changes nothing. A run that was left unfinished
(the server went down half-way) is therefore completed. Two processes may log the same variant at once. Each one that
opened a run looks which run was first. The later process deletes its own run and waits for the other's; if that one is
not finished in a few seconds, it completes it. A run that fails for another reason ends as FAILED with the reason, and
does not count.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.inert import masked

from .connection import artifact_location, connected, reason
from .records import Record, flat
from .view import experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

KEY = "hwpq.key"
FAILURE = "failure"
_OPEN = ("RUNNING", "SCHEDULED")
METRICS_A_REQUEST = 1000
#: Seconds that an open run gets: a living process writes one in less.
PATIENCE = 10.0


def log_once(record: Record, *, experiment: str, tracking_uri: str) -> tuple[str, bool]:
    """Log a variant unless its content is logged already.

    Args:
        record: what to log.
        experiment: name of the MLflow experiment; made when missing.
        tracking_uri: as `resolve_uri` gives it.

    Returns:
        The id of the finished run, and whether it is new.

    Raises:
        HwpqError: the server cannot be reached or refuses.
    """
    with connected(tracking_uri) as client:
        experiment_id = experiment_of(client, experiment, tracking_uri)
        run, mine = _written(client, experiment_id, record, tracking_uri)
        run_id = str(run.info.run_id)
        if run.info.status == "FINISHED":
            return run_id, False
        first = _alive(client, experiment_id, record.key)[0]
        if mine and first.info.run_id != run_id:  # another process was first, and its run holds the same
            client.delete_run(run_id)
            return str(first.info.run_id), False
        return run_id, True


def _written(client: MlflowClient, experiment_id: str, record: Record, tracking_uri: str) -> tuple[Run, bool]:
    """The run that this process has written into, or found finished; and whether this process opened it."""
    from mlflow.exceptions import MlflowException

    while True:
        run, mine = _claim(client, experiment_id, record)
        if run.info.status == "FINISHED":
            return run, mine
        try:
            _write(client, run, record, tracking_uri)
            return run, mine
        except MlflowException:
            # The process that opened this run found another one first, and deleted its own: claim again.
            if mine or client.get_run(run.info.run_id).info.lifecycle_stage != "deleted":
                raise


def experiment_of(client: MlflowClient, name: str, tracking_uri: str) -> str:
    """The experiment's id. A missing experiment is made, with its description and columns."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = artifact_location(tracking_uri)
            experiment_id = client.create_experiment(name, artifact_location=location)
            found = client.get_experiment(experiment_id)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise HwpqError(
            f"MLflow experiment {name!r} is deleted",
            where=masked(tracking_uri),
            remedy=f"Restore it with `mlflow experiments restore -x {found.experiment_id}`, or name another: "
            "track.experiment",
        )
    _describe(client, found)
    return str(found.experiment_id)


def _describe(client: MlflowClient, experiment: Experiment) -> None:
    """Give the experiment the tags that it lacks. A database may refuse while another process does the same."""
    from mlflow.exceptions import MlflowException

    for tag, value in experiment_tags(experiment.experiment_id).items():
        if experiment.tags.get(tag) == value:
            continue
        try:
            client.set_experiment_tag(experiment.experiment_id, tag, value)
        except MlflowException:
            if client.get_experiment(experiment.experiment_id).tags.get(tag) != value:
                raise


def _claim(client: MlflowClient, experiment_id: str, record: Record) -> tuple[Run, bool]:
    """The run to write into, and whether this process opened it."""
    alive = _alive(client, experiment_id, record.key)
    if not alive:
        tags = {KEY: record.key, "variant": record.variant}
        mine = client.create_run(experiment_id, run_name=record.variant, tags=tags)
        alive = _alive(client, experiment_id, record.key)
        if alive[0].info.run_id == mine.info.run_id:
            return mine, True
        client.delete_run(mine.info.run_id)
    finished = next((run for run in alive if run.info.status == "FINISHED"), None)
    other = finished or _awaited(client, alive[0])
    # What failed in the meantime counts for nothing: begin again.
    return (other, False) if other.info.status != "FAILED" else _claim(client, experiment_id, record)


def _awaited(client: MlflowClient, run: Run) -> Run:
    """Another process's run, when it is no longer open or has been open for too long."""
    end = time.monotonic() + PATIENCE
    while run.info.status in _OPEN and time.monotonic() < end:
        time.sleep(0.2)
        run = client.get_run(run.info.run_id)
    return run


def _alive(client: MlflowClient, experiment_id: str, key: str) -> list[Run]:
    """The runs of this content that are finished or may become so, in an order that all processes agree on."""
    runs = client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'")
    alive = [run for run in runs if run.info.status in ("FINISHED", *_OPEN)]
    return sorted(alive, key=lambda run: (run.info.start_time, run.info.run_id))


def _write(client: MlflowClient, run: Run, record: Record, tracking_uri: str) -> None:
    run_id = str(run.info.run_id)
    try:
        _log(client, run, record)
    except BaseException as error:
        _fail(client, run_id, reason(error, tracking_uri))
        raise
    client.set_terminated(run_id, "FINISHED")


def _fail(client: MlflowClient, run_id: str, why: str) -> None:
    """Mark a run as FAILED with the reason. If the server is gone, the run stays open and is completed later."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        client.set_tag(run_id, FAILURE, why)
        client.set_tag(run_id, "mlflow.note.content", f"**Failed**: {why}")
        client.set_terminated(run_id, "FAILED")
    except (MlflowException, RequestException):
        return  # the error that led here is the one to tell


def _log(client: MlflowClient, run: Run, record: Record) -> None:
    from mlflow.entities import Param, RunTag

    run_id = str(run.info.run_id)
    tags = {
        "mlflow.note.content": record.description,
        **record.tags,
        **{f"sha256.{name}": value for name, value in record.digests.items()},
        **git_tags(),
    }
    client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in flat(record.parameters).items() if value is not None],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    metrics = list(_metrics(record, run.info.start_time))
    for start in range(0, len(metrics), METRICS_A_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_REQUEST])
    client.log_inputs(run_id, datasets=_inputs(record))
    for file in record.files:
        client.log_artifact(run_id, str(file))
    for path, text in record.texts.items():
        client.log_text(run_id, text, path)


def _metrics(record: Record, time_ms: int) -> Iterable[Any]:
    """All metrics, with the run's own time: logged twice they are the same."""
    from mlflow.entities import Metric

    for name, value in record.figures.items():
        yield Metric(name, value, time_ms, 0)
    for name, points in record.series.items():
        for step, value in points:
            yield Metric(name, float(value), time_ms, step)


def _inputs(record: Record) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=data.name,
                digest=data.digest[:32],  # MLflow holds 36 characters
                source_type="hwpq",
                source=json.dumps(dict(data.source)),
                profile=json.dumps(dict(data.profile)),
            ),
            [InputTag("mlflow.data.context", data.context)],
        )
        for data in record.datasets
    ]


def git_tags() -> dict[str, str]:
    """Commit of the working directory, and whether files differ from it; empty outside a repository."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        if commit is None:
            return {}
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # git is not installed
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(dirty)).lower()}
