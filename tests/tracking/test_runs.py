"""One finished run a variant and content, on a real MLflow store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.connection import resolve_uri
from hwpq_pipeline.tracking.failures import log_failure
from hwpq_pipeline.tracking.records import Dataset, Record, flat
from hwpq_pipeline.tracking.runs import FAILURE, KEY, git_tags, log_once
from tests.logged import experiment_id, logged_runs

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
        metrics={
            "perplexity": 23.5,
            "top1_agreement": 0.9,
            "seconds": {"compress": 1.5},
            "peak_rss_bytes": {"export": 7},
        },
        digests={"model": "abc", "export": "def"},
        files=(plot,),
        series={"error_quantized/q_proj": [(0, 0.25), (1, 0.5)]},
        datasets=(Dataset("corpus: evaluation", "e" * 64, "evaluation", {"path": "p"}, {"samples": 4}),),
        texts={"layers.csv": "layer\nq\n"},
        tags={"command": "dvc repro evaluate@fp8"},
        description="text",
    )


def runs(uri: str) -> list[Run]:
    return logged_runs(uri, EXPERIMENT)


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
    assert run.data.metrics == {
        "perplexity": 23.5, "top1_agreement": 0.9, "seconds/compress": 1.5, "seconds_to_make": 1.5,
        "peak_rss_bytes/export": 7,
        "error_quantized/q_proj": 0.5,
    }  # fmt: skip
    history = MlflowClient(uri).get_metric_history(run_id, "error_quantized/q_proj")
    assert [(point.step, point.value) for point in history] == [(0, 0.25), (1, 0.5)]
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("corpus: evaluation", "e" * 32)
    assert [tag.value for tag in used.tags] == ["evaluation"]
    assert run.data.tags["variant"] == "fp8"
    assert run.data.tags["command"] == "dvc repro evaluate@fp8"
    assert run.data.tags["sha256.model"] == "abc"
    assert run.data.tags[KEY] == record.key
    names = {artifact.path for artifact in MlflowClient(uri).list_artifacts(run_id)}
    assert names == {"plot.png", "layers.csv"}


def test_logging_again_adds_none_even_when_it_took_another_time_and_memory(record, uri):
    first, _ = log(record, uri)
    other = {"seconds": {"compress": 99.0}, "peak_rss_bytes": {"export": 8}, "disk_bytes": {"export": 9}}
    slower = replace(record, metrics={**record.metrics, **other})
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
    (failed,) = runs(uri)
    assert failed.info.status == "FAILED"
    assert "/nowhere/plot.png" in failed.data.tags[FAILURE]
    assert log(record, uri)[1]
    assert sorted(run.info.status for run in runs(uri)) == ["FAILED", "FINISHED"]


def test_a_run_that_was_left_open_is_taken_up_and_no_other_made(record, uri, monkeypatch):
    """What a server that went down half-way leaves behind."""
    monkeypatch.setattr("hwpq_pipeline.tracking.runs.PATIENCE", 0.5)
    client = MlflowClient(uri)
    log(record, uri)
    (run,) = runs(uri)
    client.update_run(run.info.run_id, status="RUNNING")
    assert log(record, uri) == (run.info.run_id, True)
    (run,) = runs(uri)
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "error_quantized/q_proj")) == 2
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 1


def test_many_layers_are_more_metrics_than_a_request_takes(record, uri):
    points = [(step, float(step)) for step in range(2100)]
    run_id, _ = log(replace(record, series={"error_pruned/q_proj": points}), uri)
    history = MlflowClient(uri).get_metric_history(run_id, "error_pruned/q_proj")
    assert sorted((point.step, point.value) for point in history) == points


def test_a_variant_that_cannot_be_made_is_a_failed_run_once(record, uri):
    for _ in range(2):
        log_failure("fp8", "compress", ValueError("no\nsuch grid"), experiment=EXPERIMENT, tracking_uri=uri)
    (failed,) = runs(uri)
    assert (failed.info.run_name, failed.info.status) == ("fp8", "FAILED")
    assert failed.data.tags[FAILURE] == "compress: no such grid"
    assert log(record, uri)[1]
    assert sorted(run.info.status for run in runs(uri)) == ["FAILED", "FINISHED"]


def test_a_deleted_experiment_is_told_with_the_remedy(record, uri):
    log(record, uri)
    MlflowClient(uri).delete_experiment(experiment_id(uri, EXPERIMENT))
    with pytest.raises(HwpqError, match="mlflow experiments restore"):
        log(record, uri)


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
