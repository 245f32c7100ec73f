"""A database that a full disk stopped is no obstacle to the next run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hwpq_pipeline.tracking.connection import connected

#: The largest file that the process may write: less than MLflow's database needs, more than its first migrations.
LIMIT = 100_000
PROGRAM = """
import resource, signal, sys
from mlflow import MlflowClient
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.connection import connected
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    with connected("sqlite:///{path}"):
        pass
except HwpqError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix's")
def test_a_database_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    program = PROGRAM.format(limit=LIMIT, path=tmp_path / "runs.db")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MLflow failed" in done.stdout, done.stderr[-2000:]
    assert [file.name for file in tmp_path.iterdir()] == ["runs.db.lock"]
    with connected(f"sqlite:///{tmp_path}/runs.db") as client:
        assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("*.partial*"))
