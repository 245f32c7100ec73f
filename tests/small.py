"""The project on a tiny random model and text: every stage takes a second, for tests of DVC, MLflow and CI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import copy_project, run_in
from tests.tiny import tiny_checkpoint, tiny_config, tiny_documents

EWMA = "ewma50-fp8"
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"description": "The model as it came."},
    EWMA: {
        "description": "Half the weights dropped.",
        "selection": {"structure": "unstructured", "metric": "hwpq_weighted", "sparsity": 0.5},
        "recovery": {"steps": 2},
        "quantization": {"grid": "fp8_e4m3"},
    },
    "2of4-fp8": {
        "description": "2:4 sparse.",
        "selection": {"structure": "2of4", "metric": "hwpq_weighted"},
        "recovery": {"preset": "fast"},
        "quantization": {"grid": "fp8_e4m3"},
    },
}
GATES = {
    "dense": {"maximum_perplexity_ratio": 1.001, "minimum_top1_agreement": 0.99},
    EWMA: {"maximum_perplexity_ratio": 50.0, "maximum_bytes": 10**9},
}
IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def make_small_project(folder: Path) -> Path:
    """A git and DVC repository on branch `main` whose pipelines have run, its results committed to both."""
    project = copy_project(folder)
    tiny_checkpoint(project / "source" / "model", tiny_config(hidden_size=64))
    documents = tiny_documents(count=8, words=600)[["title", "text"]].to_dict("records")
    (project / "source" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    configure(
        project,
        "parameters",
        model={"kind": "directory", "name": "tiny", "path": "source/model", "license": "apache-2.0"},
        corpus={"kind": "local", "name": "words", "path": "source/corpus.jsonl", "license": "cc0-1.0"},
        calibration={"samples": 4, "length": 64, "seed": 0},
        evaluation={"samples": 4, "length": 64, "seed": 0},
        report={"prompts": ["the river", "a <cold> stone"], "new_tokens": 8},
    )
    configure(project, "parameters_variants", variants=VARIANTS)
    configure(project, "quality_gates", quality_gates={"variants": GATES})
    # `make` then takes the environment that runs the tests for its own.
    (project / ".venv").mkdir()
    (project / ".venv" / ".installed").touch()
    ok(kedro(project))
    git(project, "init", "--quiet", "--initial-branch", "main")
    ok(dvc(project, "init", "--quiet"))
    ok(dvc(project, "config", "core.analytics", "false"))
    ok(dvc(project, "commit", "--force", "--quiet"))
    commit(project, "results")
    return project


def copy_small_project(small: Path, target: Path) -> Path:
    """A copy to change; git, DVC's cache and the MLflow database come along."""
    shutil.copytree(small, target, symlinks=True)
    return target


def configure(project: Path, name: str, *, room: str = "base", **values: object) -> None:
    """Replace top-level entries of `conf/<room>/<name>.yml`."""
    file = project / "conf" / room / f"{name}.yml"
    before = yaml.safe_load(file.read_text()) if file.exists() else {}
    file.write_text(yaml.safe_dump({**before, **values}, sort_keys=False))


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The finished process, if it succeeded."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def kedro(project: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`kedro run …` in the project."""
    return run_in(project, "kedro", "run", *arguments, warm=True, **options)


def dvc(project: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`dvc …` in the project."""
    return run_in(project, sys.executable, "-m", "dvc", *arguments, warm=True, **options)


def git(project: Path, *arguments: str) -> str:
    """`git …` in the project; what it printed."""
    return ok(run_in(project, "git", *IDENTITY, *arguments)).stdout.strip()


def commit(project: Path, message: str) -> None:
    """Commit everything that git does not ignore."""
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", message)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the user is told."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def ran(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Stages that DVC ran."""
    lines = (line for line in done.stdout.splitlines() if line.startswith("Running stage '"))
    return {line.split("'")[1] for line in lines}
