"""One finished MLflow run a variant and content.

A run is keyed by a digest of all that makes its figures: the variant's parameters, the exported weights, the
evaluation tokens and the figures themselves, without the seconds, which differ every time. The digest is a
tag; a variant whose key already has a FINISHED run is not logged again, so that `kedro run`, `dvc repro` and
a second `dvc repro` may all log, and a wiped database is filled again. A run that breaks off while it is
written ends as FAILED and does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwpq_pipeline.errors import HwpqError

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "hwpq.key"
TIMES = "seconds"


@dataclass(frozen=True)
class Record:
    """What is logged of one variant.

    Attributes:
        variant: its name.
        parameters: nested mapping of plain values; logged flat, `selection.metric`.
        metrics: figures, and under `seconds` a mapping of seconds by stage.
        digests: sha256 by name: `model`, `corpus`, `export`, `evaluation`; logged as tags.
        files: artifacts on disk.
        texts: artifacts as text, by file name.
        command: that makes the variant again.
        description: in Markdown, shown above the run.
    """

    variant: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, Any]
    digests: Mapping[str, str]
    files: tuple[Path, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    description: str = ""

    @property
    def key(self) -> str:
        """Digest of the content, seconds left out."""
        content = {
            "variant": self.variant,
            "parameters": flat(self.parameters),
            "digests": dict(self.digests),
            "metrics": {name: value for name, value in self.metrics.items() if name != TIMES},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = value
    return result


def resolve_uri(configured: str) -> str:
    """The tracking URI in force: `MLFLOW_TRACKING_URI`, else the configured one, its sqlite path absolute.

    MLflow resolves a relative sqlite path against the working directory of whoever asks, so that the UI
    started elsewhere would open an empty database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    path = uri.removeprefix("sqlite:///")
    if path != uri and not path.startswith("/"):
        uri = f"sqlite:///{Path(path).resolve()}"
    return uri


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
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        experiment_id = _experiment(client, experiment, tracking_uri)
        if (found := _finished(client, experiment_id, record.key)) is not None:
            return found, False
        return _write(client, experiment_id, record), True
    except MlflowException as error:
        reason = " ".join(str(error).replace(tracking_uri, _masked(tracking_uri)).split())[:300]
        raise HwpqError(
            f"MLflow failed ({reason})",
            where=_masked(tracking_uri),
            remedy="The results are on disk; log them later with `kedro run --pipelines track`.",
        ) from error


def _experiment(client: MlflowClient, name: str, tracking_uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Beside a local database the artifacts belong beside it; a server has a place of its own.
    database = tracking_uri.removeprefix("sqlite:///")
    location = (Path(database).parent / "mlartifacts").as_uri() if database != tracking_uri else None
    return str(client.create_experiment(name, artifact_location=location))


def _finished(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    runs = client.search_runs(
        [experiment_id], f"tags.`{KEY}` = '{key}' and attributes.status = 'FINISHED'", max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


def _write(client: MlflowClient, experiment_id: str, record: Record) -> str:
    from mlflow.entities import Metric, Param, RunTag

    tags = {
        KEY: record.key,
        "variant": record.variant,
        "command": record.command,
        "mlflow.note.content": record.description,
        **{f"sha256.{name}": value for name, value in record.digests.items()},
        **git_tags(),
    }
    run = client.create_run(experiment_id, run_name=record.variant)
    run_id: str = run.info.run_id
    try:
        figures = {name: value for name, value in flat(record.metrics).items() if _is_number(value)}
        client.log_batch(
            run_id,
            metrics=[Metric(name, float(value), run.info.start_time, 0) for name, value in figures.items()],
            params=[Param(name, str(value)) for name, value in flat(record.parameters).items() if value is not None],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        for file in record.files:
            client.log_artifact(run_id, str(file))
        for file_name, text in record.texts.items():
            client.log_text(run_id, text, file_name)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _masked(uri: str) -> str:
    """The URI without a password."""
    scheme, separator, rest = uri.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}***@{host}" if at and credentials else uri
