"""The whole on the real model and text, in the `ci` environment: through `kedro run`, then through `dvc repro`.

What depends on no model (what is run again after which change, a wiped database, a pipeline alone) is in `test_ci.py`
and `test_commands.py`, on a tiny one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.measuring import COSTS, DISK, MEMORY, SECONDS
from tests.conftest import ROOT, copy_project, run_in

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VARIANTS = ("dense", "2of4-fp8", "ewma50-int4")
KEYS = {
    "perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement", "coverage", "sparsity", "size_bytes",
    "compression_ratio", "seconds",
}  # fmt: skip
STAGES = {"fetch", "calibrate", "reference", "select", "compress", "export", "evaluate"}


def new_project(folder: Path) -> Path:
    """A copy of the project that shares the downloads."""
    project = copy_project(folder)
    cache = ROOT / "data" / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    (project / "data").mkdir()
    (project / "data" / ".cache").symlink_to(cache)
    return project


def check(done):
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def kedro(project: Path, *arguments: str):
    return run_in(project, sys.executable, "-m", "kedro", "run", "--env", "ci", *arguments)


def metrics(project: Path, variant: str) -> dict:
    return json.loads((project / "data" / "08_reporting" / variant / "metrics.json").read_text())


def finished_runs(project: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("hwpq")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert all(run.info.status == "FINISHED" for run in runs)
    return sorted(run.info.run_name for run in runs)


@pytest.fixture(scope="module")
def kedro_project(tmp_path_factory) -> Path:
    project = new_project(tmp_path_factory.mktemp("kedro") / "project")
    done = check(kedro(project))
    assert "Compressed variants" in done.stdout
    assert "mlflow ui" in done.stdout
    return project


@pytest.mark.parametrize("variant", VARIANTS)
def test_reports_are_whole(kedro_project, variant):
    figures = metrics(kedro_project, variant)
    assert set(figures) >= KEYS
    for cost in (SECONDS, MEMORY, DISK):
        assert set(figures[cost]) == STAGES | ({"formats"} if variant == "2of4-fp8" else set())
    charts = kedro_project / "data" / "09_comparison" / "charts" / variant
    for name in ("error_by_layer.png", "sparsity_by_layer.png"):
        assert (charts / name).read_bytes().startswith(b"\x89PNG")
    texts = json.loads((kedro_project / "data" / "08_prompts" / f"{variant}.json").read_text())
    assert [entry["prompt"] for entry in texts] == ["The capital of France is"]
    assert texts[0]["continuation"] in (kedro_project / "data" / "09_comparison" / "index.html").read_text()
    assert (kedro_project / "data" / "09_comparison" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_working_variants(kedro_project):
    dense, sparse, four = (metrics(kedro_project, variant) for variant in VARIANTS)
    assert dense["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert dense["kl_divergence"] < 1e-4
    assert dense["top1_agreement"] == pytest.approx(1, abs=0.01)
    assert [found["coverage"] for found in (dense, sparse, four)] == [0, 1, 1]
    assert sparse["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert four["sparsity"] >= 0.5 - 0.001  # rounding to 4 bits adds zeros
    assert 1 < sparse["perplexity_ratio"] < 8
    assert 1 < four["perplexity_ratio"] < 8
    assert sparse["compression_ratio"] > 1.6
    assert four["compression_ratio"] > 2.3


def test_the_export_loads_with_stock_transformers(kedro_project):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hwpq_pipeline.checkpoints.quiet import quiet_transformers

    path = kedro_project / "data" / "07_export" / "2of4-fp8"
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**text, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == text["input_ids"].shape[1] + 4
    assert (path / "README.md").read_text().startswith("---")


def test_one_finished_run_a_variant_and_none_more_on_rerun(kedro_project):
    assert finished_runs(kedro_project) == sorted(VARIANTS)
    assert "0 new runs" in check(kedro(kedro_project, "--pipelines", "track")).stdout
    assert finished_runs(kedro_project) == sorted(VARIANTS)


def test_a_corrupt_checkpoint_is_one_line_and_keeps_what_was_there(kedro_project):
    weights = kedro_project / "data" / "01_raw" / "model" / "model.safetensors"
    masks = kedro_project / "data" / "05_selection" / "2of4-fp8" / "masks"
    whole, before = weights.read_bytes(), sha256_directory(masks)
    weights.write_bytes(whole[:-1000])
    try:
        done = kedro(kedro_project, "--pipelines", "select,compress", "--namespaces", "variants.2of4-fp8")
    finally:
        weights.write_bytes(whole)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model.safetensors" in line
    assert sha256_directory(masks) == before
    assert not list((kedro_project / "data").rglob("*.partial"))


# --- DVC ---------------------------------------------------------------------------------------------


def overlay_ci(project: Path) -> None:
    """DVC tracks `conf/base`: put the `ci` values there."""
    for file in (project / "conf" / "ci").glob("*.yml"):
        base = project / "conf" / "base" / file.name
        values = yaml.safe_load(base.read_text())
        values.update(yaml.safe_load(file.read_text()))
        base.write_text(yaml.safe_dump(values, sort_keys=False))


def dvc(project: Path, *arguments: str):
    return run_in(project, sys.executable, "-m", "dvc", *arguments, timeout=2400, warm=True)


def git(project: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    check(run_in(project, "git", *identity, *arguments))


def ran(done) -> set[str]:
    """Stages that `dvc repro` ran."""
    lines = (line for line in done.stdout.splitlines() if line.startswith("Running stage '"))
    return {line.split("'")[1] for line in lines}


@pytest.fixture(scope="module")
def dvc_project(tmp_path_factory) -> Path:
    project = new_project(tmp_path_factory.mktemp("dvc") / "project")
    overlay_ci(project)
    (project / "conf" / "ci").rename(project / "conf" / "unused")
    git(project, "init", "--quiet")
    check(dvc(project, "init", "--quiet"))
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "start")
    done = check(dvc(project, "repro"))
    per_variant = {
        f"{stage}@{variant}"
        for stage in ("select", "compress", "export", "evaluate", "prompts")
        for variant in VARIANTS
    }
    shared = {"fetch", "plan", "calibrate", "reference", "recipes", "report", "track", "publish"}
    assert ran(done) == shared | per_variant
    return project


def test_repro_gives_what_kedro_run_gives(kedro_project, dvc_project):
    for variant in VARIANTS:
        one, other = (
            {key: value for key, value in metrics(project, variant).items() if key not in COSTS}
            for project in (kedro_project, dvc_project)
        )
        assert one == other
        here, there = (
            sha256_directory(project / "data" / "05_selection" / variant / "masks")
            for project in (kedro_project, dvc_project)
        )
        assert here == there
        first, second = (
            sha256_directory(project / "data" / "07_export" / variant) for project in (kedro_project, dvc_project)
        )
        assert first == second
    assert finished_runs(dvc_project) == sorted(VARIANTS)
