"""The hook that logs a variant that cannot be made."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kedro.pipeline import node
from kedro.pipeline.node import Node

from hwpq_pipeline.failures import FailureHooks
from tests.logged import logged_runs


def hooks(**parameters: Any) -> FailureHooks:
    made = FailureHooks()
    context: Any = SimpleNamespace(config_loader={"parameters": parameters})
    made.after_context_created(context)
    return made


def failing(name: str, namespace: str | None) -> Node:
    return node(lambda model: model, "model", "weights", name=name, namespace=namespace)


@pytest.mark.parametrize(
    ("name", "namespace"),
    [("fetch_model", None), ("compare", "variants"), ("log", "variants.fp8")],
    ids=["of no variant", "of all variants", "logging itself"],
)
def test_what_is_no_variants_failure_is_not_logged(tmp_path: Path, name: str, namespace: str | None) -> None:
    made = hooks(track={"experiment": "e", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})
    made.on_node_error(ValueError("no"), failing(name, namespace))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_variants_failure_is_a_failed_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"  # the environment names the same (tests/conftest.py)
    made = hooks(track={"experiment": "e", "tracking_uri": uri})
    made.on_node_error(ValueError("no such grid"), failing("compress_weights", "variants.fp8"))
    (run,) = logged_runs(uri, "e")
    assert (run.info.run_name, run.info.status) == ("fp8", "FAILED")
    assert run.data.tags["failure"] == "compress_weights: no such grid"


def test_a_server_that_is_away_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = hooks(track={"experiment": "e", "tracking_uri": "sqlite:///mlflow.db"})
    with caplog.at_level(logging.WARNING):
        made.on_node_error(ValueError("no"), failing("compress_weights", "variants.fp8"))
    assert "The failure was not logged" in caplog.text
