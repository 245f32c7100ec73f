"""The MLflow store in force, and its failures in one line.

A store is a server or a local sqlite file. A server that does not answer must not delay a run for minutes, so requests
are repeated for a few seconds only, unless the environment says otherwise. Two processes on one sqlite file would trip
over each other's migrations and locks, so they take turns with a lock file beside it. MLflow makes a new file in some
eighty migrations, and cannot go on from one that a full disk has stopped. So the file is made beside, and moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.inert import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
LATER = "The results are on disk; log them later with `kedro run --pipelines track`"


def resolve_uri(configured: str) -> str:
    """The tracking URI in force: `MLFLOW_TRACKING_URI`, else the configured one, its sqlite path absolute.

    MLflow resolves a relative sqlite path against the working directory of the process that asks. A UI that is started
    in another directory would open an empty database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    path = uri.removeprefix(_SQLITE)
    if path != uri and not path.startswith("/"):
        uri = f"{_SQLITE}{Path(path).resolve()}"
    return uri


@contextmanager
def connected(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client of the store.

    Args:
        tracking_uri: as `resolve_uri` gives it.

    Raises:
        HwpqError: the store cannot be reached or refuses.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    try:
        with _turn(tracking_uri):
            _make_database(tracking_uri)
            yield MlflowClient(tracking_uri=tracking_uri)
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise HwpqError(
            f"MLflow failed ({reason(error, tracking_uri)})", where=masked(tracking_uri), remedy=LATER
        ) from error


def _turn(tracking_uri: str) -> AbstractContextManager[object]:
    from filelock import FileLock

    path = tracking_uri.removeprefix(_SQLITE)
    return FileLock(f"{path}.lock") if path != tracking_uri else nullcontext()


def _make_database(tracking_uri: str) -> None:
    """Make the sqlite file if it is missing, whole or not at all."""
    from mlflow import MlflowClient

    name = tracking_uri.removeprefix(_SQLITE)
    path = Path(name)
    if name == tracking_uri or "?" in name or ":memory:" in name or path.exists():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        MlflowClient(tracking_uri=f"{_SQLITE}{partial}").search_experiments(max_results=1)
        os.replace(partial, path)
    finally:
        for left in path.parent.glob(f"{partial.name}*"):
            left.unlink()


def artifact_location(tracking_uri: str) -> str | None:
    """Where the artifacts of a local store belong: beside it. None for a server, which has a place of its own."""
    path = tracking_uri.removeprefix(_SQLITE)
    return (Path(path).parent / "mlartifacts").as_uri() if path != tracking_uri else None


def reason(error: BaseException, tracking_uri: str) -> str:
    """An error in a line, without a password."""
    text = f"{type(error).__name__}: {error}" if not str(error) else str(error)
    return " ".join(text.replace(tracking_uri, masked(tracking_uri)).split())[:300]
