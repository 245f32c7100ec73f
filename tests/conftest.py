"""Set-up of every test: no hub, no window, no user's tracking store; and a copy of the project to run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

# The libraries read these at import, so they are set before any test module is imported.
os.environ.update(
    {
        "DO_NOT_TRACK": "true",
        "DVC_NO_ANALYTICS": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "ITERATIVE_DO_NOT_TRACK": "1",
        "KEDRO_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }
)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # runs the CUDA kernels without a GPU; Triton reads it at import
os.environ.setdefault("NUMBA_NUM_THREADS", "2")  # two, so that races between threads can show, on any machine
os.environ.pop("MLFLOW_TRACKING_URI", None)  # a user's server must not see the tests' runs

ROOT = Path(__file__).resolve().parents[1]
# What a run reads. `data/` is not copied: a test starts from nothing, or copies what it needs.
PROJECT_FILES = (
    "conf", "src", "pyproject.toml", "requirements.lock", "dvc.yaml", "Makefile", ".ci", ".dvcignore", ".gitignore",
    ".telemetry",
)  # fmt: skip


#: What takes longest begins first, so that the other worker has something to do meanwhile.
LONGEST = ("test_end_to_end.py", "test_ci.py", "test_staleness.py", "test_commands.py", "test_remote.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others keep their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _own_tracking_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point MLflow at a database of the test's own, so that no test writes the project's `mlflow.db`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def root() -> Path:
    """Return the project's root, to read from; tests write only under `tmp_path`."""
    return ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of what a run reads (configuration, code, stages), elsewhere, without data."""
    return copy_project(tmp_path / "project")


def copy_project(target: Path) -> Path:
    """Copy the files that a run reads to `target` and return it; the user's `conf/local` stays behind."""
    target.mkdir(parents=True)
    for name in PROJECT_FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy2(source, target / name)
    shutil.rmtree(target / "conf" / "local", ignore_errors=True)
    (target / "conf" / "local").mkdir(parents=True, exist_ok=True)
    (target / "conf" / "local" / ".gitkeep").touch()  # git keeps no empty folder, and DVC's experiments are checkouts
    return target


def run_in(
    project: Path, *command: str, env: Mapping[str, str] | None = None, timeout: float = 1800, warm: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy of the project, on the copy's code, logging to the copy's own `mlflow.db`.

    With `warm`, a `kedro` that it starts comes from a process that has the libraries already (`tests/warm.py`).

    Returns the finished process with its output as text. The caller asserts the exit status.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(project / "src")
    # This environment's tools come first, however pytest was started: DVC calls `kedro` by name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if warm:
        from tests.warm import folder_of_kedro

        environment["PATH"] = f"{folder_of_kedro()}{os.pathsep}{environment['PATH']}"
    environment.update(env or {})
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point Hugging Face's client at a local hub; return its root (`tests/checkpoints/hub.py` says what goes where)."""
    from tests.checkpoints.hub import serve_hub

    root = tmp_path_factory.mktemp("hub")
    with serve_hub(root) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield root


@pytest.fixture(scope="session")
def small_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the project on a tiny model, run once, to read from (`tests/small.py`)."""
    from tests.small import make_small_project

    return make_small_project(tmp_path_factory.mktemp("small") / "project")


@pytest.fixture
def small(small_project: Path, tmp_path: Path) -> Path:
    """Return a copy of it to change."""
    from tests.small import copy_small_project

    return copy_small_project(small_project, tmp_path / "project")
