"""One finished run a variant and content, on a real MLflow store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.runs import KEY, Record, flat, git_tags, log_once, resolve_uri

EXPERIMENT = "hwpq-test"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """Made once: MLflow's migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tmp_path, empty_database) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def record(tmp_path) -> Record:
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"\x89PNG")
    return Record(
        variant="fp8",
        parameters={"variant": {"quantization": {"grid": "fp8_e4m3", "group_size": None}}},
        metrics={"perplexity": 23.5, "top1_agreement": 0.9, "seconds": {"compress": 1.5}},
        digests={"model": "abc", "export": "def"},
        files=(plot,),
        texts={"layers.csv": "layer\nq\n"},
        command="dvc repro evaluate@fp8",
        description="text",
    )


def runs(uri: str) -> list:
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])


def log(record: Record, uri: str) -> tuple[str, bool]:
    return log_once(record, experiment=EXPERIMENT, tracking_uri=uri)


def test_a_run_holds_everything(record, uri):
    run_id, new = log(record, uri)
    assert new
    (run,) = runs(uri)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fp8"
    assert run.data.params == {"variant.quantization.grid": "fp8_e4m3"}
    assert run.data.metrics == {"perplexity": 23.5, "top1_agreement": 0.9, "seconds.compress": 1.5}
    assert run.data.tags["variant"] == "fp8"
    assert run.data.tags["command"] == "dvc repro evaluate@fp8"
    assert run.data.tags["sha256.model"] == "abc"
    assert run.data.tags[KEY] == record.key
    names = {artifact.path for artifact in MlflowClient(uri).list_artifacts(run_id)}
    assert names == {"plot.png", "layers.csv"}


def test_logging_again_adds_none_even_when_it_took_another_time(record, uri):
    first, _ = log(record, uri)
    slower = replace(record, metrics={**record.metrics, "seconds": {"compress": 99.0}})
    assert log(slower, uri) == (first, False)
    assert len(runs(uri)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"perplexity": 23.6}},
        {"digests": {"model": "other", "export": "def"}},
        {"parameters": {"variant": {"quantization": {"grid": "int8"}}}},
        {"variant": "fp8-too"},
    ],
)
def test_other_content_is_another_run(record, uri, change):
    log(record, uri)
    assert log(replace(record, **change), uri)[1]
    assert len(runs(uri)) == 2


def test_a_deleted_run_is_logged_again(record, uri):
    run_id, _ = log(record, uri)
    MlflowClient(uri).delete_run(run_id)
    assert log(record, uri)[1]
    assert len(runs(uri)) == 1


def test_a_run_that_breaks_off_is_failed_and_does_not_count(record, uri):
    broken = replace(record, files=(Path("/nowhere/plot.png"),))
    with pytest.raises((OSError, MlflowException)):
        log(broken, uri)
    assert [run.info.status for run in runs(uri)] == ["FAILED"]
    assert log(record, uri)[1]
    assert sorted(run.info.status for run in runs(uri)) == ["FAILED", "FINISHED"]


def test_environment_wins_and_sqlite_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert resolve_uri("sqlite:///mlflow.db") == "http://127.0.0.1:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:////abs/mlflow.db") == "sqlite:////abs/mlflow.db"


def test_no_server_is_told_with_the_remedy_and_no_password(record, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(HwpqError, match="kedro run --pipelines track") as caught:
        log(record, "http://user:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_flat():
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_no_git_tags_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_tags() == {}
