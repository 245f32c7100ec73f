"""Quality gates, `make ci`, a DVC remote and experiments, with the real tools on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Run

from tests.conftest import run_in
from tests.logged import logged_runs
from tests.small import EWMA, GATES, VARIANTS, configure, dvc, error_lines, git, kedro, ok, ran

pytestmark = pytest.mark.slow

FILE = "conf/base/parameters_variants.yml"
PER_VARIANT = {"select", "compress", "export", "evaluate", "prompts"}


def tighten(project: Path, *, room: str = "base") -> None:
    gates = {**GATES, EWMA: {"minimum_top1_agreement": 1.0, "maximum_bytes": 1}}
    configure(project, "quality_gates", room=room, quality_gates={"variants": gates})


def with_sparsity(value: float) -> dict:
    entry = VARIANTS[EWMA]
    return {**VARIANTS, EWMA: {**entry, "selection": {**entry["selection"], "sparsity": value}}}


def runs(project: Path) -> list[Run]:
    return logged_runs(f"sqlite:///{project}/mlflow.db")


def metrics_of(project: Path, variant: str = EWMA) -> dict:
    return json.loads((project / "data" / "08_reporting" / variant / "metrics.json").read_text())


# --- gates -------------------------------------------------------------------------------------------


def test_gates_that_hold_pass(small_project):
    done = ok(kedro(small_project, "--pipelines", "gate"))
    assert "4 quality gates of 2 variants hold" in " ".join((done.stdout + done.stderr).split())


def test_gates_that_do_not_are_a_line_each_and_change_nothing(small):
    tighten(small, room="local")
    before = git(small, "status", "--porcelain")
    done = kedro(small, "--pipelines", "gate")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = error_lines(done)
    assert len(lines) == 2
    assert all(EWMA in line for line in lines)
    assert "top1_agreement" in lines[0]
    assert "size_bytes" in lines[1]
    assert git(small, "status", "--porcelain") == before


def test_a_misspelt_gate_is_named(small):
    configure(small, "quality_gates", room="local", quality_gates={"variants": {"dense": {"maximum_perplexity": 2}}})
    done = kedro(small, "--pipelines", "gate")
    assert done.returncode == 1
    (line,) = error_lines(done)
    assert "quality_gates" in line
    assert "maximum_perplexity" in line


# --- make ci -----------------------------------------------------------------------------------------


def test_ci_reruns_one_variant_compares_with_main_and_fails_on_a_gate(small):
    before = metrics_of(small)
    configure(small, "parameters_variants", variants=with_sparsity(0.7))
    done = ok(run_in(small, "make", "ci", warm=True))
    over_all = {"plan", "recipes", "report", "track", "publish"}
    assert ran(done) == {f"{stage}@{EWMA}" for stage in PER_VARIANT} | over_all
    assert len(runs(small)) == len(VARIANTS) + 1
    summary = (small / "data" / "09_comparison" / "summary.md").read_text()
    assert "All quality gates hold" in summary
    after = metrics_of(small)
    assert f"| {EWMA} | perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} | " in summary
    assert f"| {EWMA} | sparsity of the blocks | {before['sparsity']:.1%} | {after['sparsity']:.1%} | " in summary
    assert "| dense |" not in summary
    assert "](pareto.png)" in summary
    changed = json.loads(ok(dvc(small, "metrics", "diff", "--json")).stdout)
    assert set(changed) == {f"data/08_reporting/{EWMA}/metrics.json"}
    parameters = json.loads(ok(dvc(small, "params", "diff", "--json")).stdout)
    (sparsity,) = [value for section in parameters.values() for value in section.values()]
    assert (sparsity["old"], sparsity["new"]) == (0.5, 0.7)

    tighten(small)
    failed = run_in(small, "make", "ci", warm=True)
    assert failed.returncode != 0
    assert ran(failed) == {"track"}
    assert len(runs(small)) == len(VARIANTS) + 1
    summary = (small / "data" / "09_comparison" / "summary.md").read_text()
    assert "Quality gates failed" in summary
    assert summary.count("- quality gate, ") == 2


def test_ci_against_no_revision_says_so(small_project):
    done = run_in(small_project, "make", "ci", "BASE=nowhere", warm=True)
    assert done.returncode != 0
    (line,) = error_lines(done)
    assert "nowhere" in line


def test_the_picture_is_published_beside_the_code(small, tmp_path):
    origin, page = tmp_path / "origin.git", tmp_path / "page.md"
    subprocess.run(["git", "init", "--quiet", "--bare", str(origin)], check=True)
    git(small, "remote", "add", "origin", str(origin))
    comparison = small / "data" / "09_comparison"
    (comparison / "summary.md").write_text("figures\n![picture](pareto.png)\n")
    for _ in range(2):  # the second finds the branch
        ok(run_in(small, ".ci/publish", "https://example.org/o/n", str(page)))
        commit_id = git(small, "ls-remote", "origin", "refs/heads/ci-pictures").split()[0]
        assert page.read_text().endswith(f"](https://example.org/o/n/raw/{commit_id}/pareto.png)\n")
        shown = subprocess.run(
            ["git", "-C", origin, "show", f"{commit_id}:pareto.png"], capture_output=True, check=True
        )
        assert shown.stdout == (comparison / "pareto.png").read_bytes()
    assert git(small, "log", "--format=%s", "main") == "results"

    git(small, "remote", "set-url", "--push", "origin", str(tmp_path / "not-mine.git"))
    page.unlink()
    ok(run_in(small, ".ci/publish", "https://example.org/o/n", str(page)))
    assert page.read_text() == "figures\n"


def test_workflow_runs_what_there_is(root):
    """Every local command of the workflow exists; its YAML loads with the keys that GitHub reads."""
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow["jobs"]) == {"tests", "newest", "long", "variants"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", commands))
    assert targets == {"install", "ci", "lint", "test-sweep", "test-postgres", "test-browser"}
    for target in targets:
        assert f"\n{target}: " in makefile
    for script in ("run", "publish"):
        assert f".ci/{script}" in commands
        assert (root / ".ci" / script).stat().st_mode & 0o111


# --- DVC ---------------------------------------------------------------------------------------------


def stale(project: Path) -> set[str]:
    """Stages that `dvc status` finds changed; `track` always is (dvc.yaml)."""
    return set(json.loads(ok(dvc(project, "status", "--json")).stdout)) - {"track"}


def test_a_wiped_copy_is_pulled_whole(small, tmp_path):
    ok(dvc(small, "remote", "add", "--default", "store", str(tmp_path / "store")))
    ok(dvc(small, "push"))
    weights = small / "data" / "07_export" / EWMA / "model.safetensors"
    whole = weights.read_bytes()
    for folder in small.glob("data/0*"):
        shutil.rmtree(folder)
    shutil.rmtree(small / ".dvc" / "cache")
    assert stale(small) >= {"fetch", f"export@{EWMA}"}
    git(small, "checkout", "--", "data")  # figures are git's
    ok(dvc(small, "pull"))
    assert stale(small) == set()
    assert weights.read_bytes() == whole
    # Nothing is computed again; an empty database is filled again.
    (small / "mlflow.db").unlink()
    assert ran(ok(dvc(small, "repro"))) == {"track"}
    assert sorted(run.info.run_name for run in runs(small)) == sorted(VARIANTS)
    assert {run.info.status for run in runs(small)} == {"FINISHED"}

    shown = json.loads(ok(dvc(small, "metrics", "show", "--json")).stdout)[""]["data"]
    assert {f"data/08_reporting/{variant}/metrics.json" for variant in VARIANTS} <= set(shown)
    ok(dvc(small, "plots", "show", "--out", "plots"))
    page = (small / "plots" / "index.html").read_text()
    for picture in ("pareto.png", "error_by_layer.png", "sparsity_by_layer.png"):
        assert picture in page


def test_a_prompt_evaluates_nothing_again(small):
    configure(small, "parameters", report={"prompts": ["the wide river"], "new_tokens": 8})
    prompted = {"plan", *(f"prompts@{variant}" for variant in VARIANTS)}
    assert stale(small) == prompted
    assert ran(ok(dvc(small, "repro"))) == prompted | {"report", "track"}
    assert "the wide river" in (small / "data" / "09_comparison" / "index.html").read_text()


def test_a_colour_of_a_chart_evaluates_nothing_again(small):
    file = small / "src" / "hwpq_pipeline" / "reporting" / "charts.py"
    assert '"#0072B2"' in file.read_text()
    file.write_text(file.read_text().replace('"#0072B2"', '"#0072B3"'))
    assert stale(small) == {"report"}


def test_a_label_of_a_figure_evaluates_nothing_again(small):
    file = small / "src" / "hwpq_pipeline" / "figures.py"
    assert '"MB on disk"' in file.read_text()
    file.write_text(file.read_text().replace('"MB on disk"', '"megabytes"'))
    assert stale(small) == {"report", "publish"}


def test_an_experiment_changes_one_variant_and_shows(small):
    # A name that begins with a digit is no key of Hydra's, but a mapping's key may be anything.
    ok(dvc(small, "exp", "run", "--name", "other-metric",
           "-S", f"{FILE}:variants={{2of4-fp8:{{selection:{{metric:wanda}}}}}}"))  # fmt: skip
    assert yaml.safe_load((small / FILE).read_text())["variants"]["2of4-fp8"]["selection"]["metric"] == "wanda"
    assert sorted(run.info.run_name for run in runs(small)) == sorted([*VARIANTS, "2of4-fp8"])
    shown = json.loads(ok(dvc(small, "exp", "show", "--json")).stdout)
    experiment = next(row for row in flatten(shown) if row.get("name") == "other-metric" and "data" in row)
    figures = experiment["data"]["metrics"]["data/08_reporting/2of4-fp8/metrics.json"]["data"]
    assert figures["perplexity"] == pytest.approx(metrics_of(small, "2of4-fp8")["perplexity"])


def flatten(value: object) -> list[dict]:
    """All mappings inside nested lists and mappings."""
    if isinstance(value, dict):
        return [value, *(found for part in value.values() for found in flatten(part))]
    return [found for part in value for found in flatten(part)] if isinstance(value, list) else []


@pytest.mark.sweep
def test_a_sweep_arrives_in_mlflow(small):
    grids = "{grid:fp8_e4m3},{grid:int4,group_size:32}"
    ok(run_in(small, "make", "sweep", f"SWEEP={EWMA}", "SPARSITY=0.4", f"GRIDS={grids}", timeout=1200, warm=True))
    swept = {
        (run.data.params["selection.sparsity"], run.data.params["quantization.grid"])
        for run in runs(small)
        if run.info.run_name == EWMA
    }
    assert swept == {("0.5", "fp8_e4m3"), ("0.4", "fp8_e4m3"), ("0.4", "int4")}
    assert len(runs(small)) == len(VARIANTS) + 2
