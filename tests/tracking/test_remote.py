"""Logging to a server: one that is away, one that goes away, and two that log at once; on sqlite and on PostgreSQL."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.records import Dataset, Record
from hwpq_pipeline.tracking.runs import log_once
from tests.servers import free_port, mlflow_server, postgres, postgres_missing
from tests.small import EWMA, VARIANTS, error_lines, kedro, ok

pytestmark = pytest.mark.slow


ON_POSTGRES = pytest.param(
    "postgres", marks=[pytest.mark.postgres, pytest.mark.skipif(bool(postgres_missing()), reason=postgres_missing())]
)


@pytest.fixture(scope="module", params=["sqlite", ON_POSTGRES])
def server(request, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        on_postgres = request.param == "postgres"
        store = stack.enter_context(postgres()) if on_postgres else f"sqlite:///{folder}/mlflow.db"
        yield stack.enter_context(mlflow_server(store, folder))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"\x89PNG")
    return Record(
        variant="fp8",
        parameters={"quantization": {"grid": "fp8_e4m3"}},
        metrics={"perplexity": 23.5, "seconds": {"compress": 1.5}},
        digests={"export": "def"},
        series={"error_quantized/q_proj": [(0, 0.25), (1, 0.5)]},
        datasets=(Dataset("corpus", "e" * 64, "evaluation"),),
        files=(plot,),
        texts={"layers.csv": "layer\nq\n"},
    )


def runs(address: str, experiment: str) -> list:
    client = MlflowClient(address)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


@contextmanager
def fails_after(address: str, requests_served: int) -> Iterator[tuple[str, threading.Event]]:
    """A way to the server that passes so many requests on and is dead until the event is set; its address."""
    served = iter(range(requests_served))
    revived = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            if next(served, None) is None and not revived.is_set():
                self.connection.close()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = requests.request(self.command, address + self.path, data=body, headers=headers, timeout=60)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", revived
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def test_a_server_that_goes_down_half_way_is_completed_later_without_duplicates(server, record, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("hwpq_pipeline.tracking.runs.PATIENCE", 0.0)
    whole = replace(record, variant="whole")
    log_once(whole, experiment="whole", tracking_uri=server)
    (wanted,) = runs(server, "whole")
    broken = 0
    for count in range(1, 40):
        experiment = f"after-{count}"
        with fails_after(server, count) as (address, revived):
            try:
                log_once(record, experiment=experiment, tracking_uri=address)
            except HwpqError as error:
                assert "kedro run --pipelines track" in str(error)  # noqa: PT017 - the last one does not raise
                broken += 1
            revived.set()
            log_once(record, experiment=experiment, tracking_uri=address)
        (run,) = runs(server, experiment)
        assert run.info.status == "FINISHED"
        assert run.data.metrics == wanted.data.metrics
        assert run.data.params == wanted.data.params
        assert len(run.inputs.dataset_inputs) == 1
        names = {artifact.path for artifact in MlflowClient(server).list_artifacts(run.info.run_id)}
        assert names == {"plot.png", "layers.csv"}
        if broken < count:
            break
    assert broken >= 8  # every request of a whole logging was the last one once


def test_many_that_log_at_once_are_one_run(server, record):
    barrier = threading.Barrier(4)
    found: list[str] = []

    def log() -> None:
        barrier.wait()
        found.append(log_once(record, experiment="at-once", tracking_uri=server)[0])

    threads = [threading.Thread(target=log) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (run,) = runs(server, "at-once")
    assert run.info.status == "FINISHED"
    assert len(found) == 4
    assert log_once(record, experiment="at-once", tracking_uri=server) == (run.info.run_id, False)


def test_a_run_that_its_owner_deletes_meanwhile_is_not_the_one(server, record, monkeypatch):
    """A slow process's run is completed by another one, while the slow one sees that it was second and deletes it."""
    from hwpq_pipeline.tracking import runs as module

    monkeypatch.setattr(module, "PATIENCE", 0.0)
    client = MlflowClient(server)
    experiment = client.create_experiment("deleted-meanwhile")
    slow = client.create_run(experiment, tags={module.KEY: record.key})
    real = module._log
    deleted: list[str] = []

    def log(client, run, record):
        if not deleted:
            deleted.append(run.info.run_id)
            client.delete_run(run.info.run_id)
        real(client, run, record)

    monkeypatch.setattr(module, "_log", log)
    run_id, new = log_once(record, experiment="deleted-meanwhile", tracking_uri=server)
    assert deleted == [slow.info.run_id]
    (run,) = runs(server, "deleted-meanwhile")
    assert (run.info.run_id, run.info.status, new) == (run_id, "FINISHED", True)


def test_two_tracks_at_once_give_one_run_a_variant(server, small_project):
    environment = {"MLFLOW_TRACKING_URI": server}
    done: list[subprocess.CompletedProcess[str]] = []

    def track() -> None:
        done.append(kedro(small_project, "--pipelines", "track", env=environment))

    threads = [threading.Thread(target=track) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in done:
        ok(process)
    found = runs(server, "hwpq")
    assert sorted(run.info.run_name for run in found) == sorted(VARIANTS)
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_server_that_is_down_and_goes_down_by_the_command(server, small):
    """`kedro run --pipelines report,track`: nobody there, then somebody for a while, then all is well."""
    experiment = f"down-{small.parent.name}"
    local = small / "conf" / "local" / "parameters.yml"
    local.write_text(f"track:\n  experiment: {experiment}\n  tracking_uri: sqlite:///mlflow.db\n")
    shown = small / "data" / "09_comparison"
    shutil.rmtree(shown)

    def track(address: str, retries: str = "0") -> subprocess.CompletedProcess[str]:
        environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries}
        return kedro(small, "--pipelines", "report,track", env=environment)

    def fails(done: subprocess.CompletedProcess[str], address: str) -> None:
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr
        (line,) = error_lines(done)
        assert address in line
        assert "log them later with `kedro run --pipelines track`" in line

    nobody = f"http://127.0.0.1:{free_port()}"
    fails(track(nobody, retries="3"), nobody)
    for name in ("comparison.csv", "pareto.png", "index.html", f"charts/{EWMA}/error_by_layer.png"):
        assert (shown / name).exists()  # what was computed is kept
    with fails_after(server, 25) as (address, _):  # in the second variant's run
        fails(track(address), address)
    statuses = sorted(run.info.status for run in runs(server, experiment))
    assert statuses == ["FINISHED", "RUNNING"]
    done = ok(track(server))
    assert "2 new runs" in done.stdout  # the one that was left behind is finished
    found = runs(server, experiment)
    assert sorted(run.info.run_name for run in found) == sorted(VARIANTS)
    assert {run.info.status for run in found} == {"FINISHED"}
    assert "0 new runs" in ok(track(server)).stdout
    assert len(runs(server, experiment)) == len(VARIANTS)
