"""The export as a model of its run: stored once, as it is, loaded by MLflow's own loaders, no pickle in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests
from mlflow import MlflowClient, artifacts

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.tracking.models import log_model
from tests.logged import logged_runs
from tests.servers import served_model
from tests.small import EWMA, VARIANTS, configure, copy_small_project, kedro, ok

pytestmark = [
    pytest.mark.slow,
    # MLflow's loaders, of their own calls into transformers and pandas.
    pytest.mark.filterwarnings("default"),
]
PROMPT, TOKENS = "the river", 6


@pytest.fixture(scope="module")
def tracked(small_project: Path, tmp_path_factory) -> tuple[Path, dict]:
    """The project with `track.log_model`, tracked twice into an empty store; and its runs by variant."""
    project = copy_small_project(small_project, tmp_path_factory.mktemp("models") / "project")
    (project / "mlflow.db").unlink()
    configure(project, "parameters", room="local", track={
        "experiment": "hwpq", "tracking_uri": "sqlite:///mlflow.db", "log_model": True,
    })  # fmt: skip
    for new in (len(VARIANTS), 0):
        assert f"{new} new runs" in ok(kedro(project, "--pipelines", "track")).stdout
    return project, {run.info.run_name: run for run in logged_runs(f"sqlite:///{project}/mlflow.db")}


@pytest.fixture(scope="module")
def model(tracked, tmp_path_factory) -> Path:
    """The model of one run, downloaded."""
    project, runs = tracked
    target = tmp_path_factory.mktemp("downloaded")
    return Path(
        artifacts.download_artifacts(
            run_id=runs[EWMA].info.run_id, artifact_path="model", dst_path=str(target),
            tracking_uri=f"sqlite:///{project}/mlflow.db",
        )
    )  # fmt: skip


def greedy(project: Path) -> str:
    """What stock transformers writes with the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = project / "data" / "07_export" / EWMA
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(export)
        tokenizer = AutoTokenizer.from_pretrained(export)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]))


def test_the_export_is_stored_as_it_is_and_nothing_is_pickled(tracked, model):
    project, runs = tracked
    assert sha256_directory(model / "model") == runs[EWMA].data.tags["sha256.export"]
    names = {file.name for file in model.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt", ".pth", ".py"))]
    assert str(project) not in (model / "MLmodel").read_text()  # nothing of this machine
    (entry,) = json.loads(runs[EWMA].data.tags["mlflow.log-model.history"])
    assert entry["artifact_path"] == "model"
    assert set(entry["flavors"]) == {"transformers", "python_function"}


def test_mlflow_transformers_loads_it_and_writes_what_the_export_writes(tracked, model):
    import mlflow.transformers

    with quiet_transformers():
        loaded = mlflow.transformers.load_model(str(model))
        (written,) = loaded(PROMPT, max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
    assert written["generated_text"] == greedy(tracked[0])


def test_pyfunc_answers_completions(model):
    import mlflow.pyfunc

    with quiet_transformers():
        loaded = mlflow.pyfunc.load_model(str(model))
        (answer,) = loaded.predict(pd.DataFrame({"prompt": [PROMPT], "max_tokens": [TOKENS]}))
    assert answer["object"] == "text_completion"
    assert answer["model"] == EWMA
    assert 1 <= answer["usage"]["completion_tokens"] <= TOKENS


def test_mlflow_models_serve_serves_it(model, tmp_path):
    with served_model(model, tmp_path) as address:
        asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS}
        answer = requests.post(f"{address}/invocations", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()[0]["model"] == EWMA


def test_a_model_that_broke_off_is_stored_whole_later(tracked):
    project, runs = tracked
    uri = f"sqlite:///{project}/mlflow.db"
    run, export = runs["dense"].info.run_id, project / "data" / "07_export" / "dense"
    client = MlflowClient(uri)
    client.delete_tag(run, "mlflow.log-model.history")  # the last thing that is written
    assert log_model(run, export, "dense", tracking_uri=uri)
    assert not log_model(run, export, "dense", tracking_uri=uri)
    assert "mlflow.log-model.history" in client.get_run(run).data.tags


def test_without_the_parameter_no_run_has_a_model(small_project):
    uri = f"sqlite:///{small_project}/mlflow.db"
    client = MlflowClient(uri)
    for run in logged_runs(uri):
        assert "model" not in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
