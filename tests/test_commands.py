"""`hwpq variants`, `hwpq compare`, `hwpq plan`, and `kedro run` of a few pipelines, as users type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hwpq_pipeline.configuration import find_line
from tests.conftest import run_in
from tests.small import EWMA, VARIANTS, configure, error_lines, kedro, ok


def hwpq(project: Path, *arguments: str):
    return run_in(project, "kedro", "hwpq", *arguments, warm=True)


@pytest.mark.slow
def test_variants_are_listed(small_project):
    shown = ok(hwpq(small_project, "variants")).stdout
    for name in VARIANTS:
        assert name in shown
    assert "50% dropped" in shown


@pytest.mark.slow
def test_a_mixed_variant_is_listed_with_all_its_grids(small):
    mixed = {
        "description": "d",
        "quantization": {"grid": "int4", "group_size": 32},
        "layers": [{"match": ["re:.*k_proj"], "quantization": {"grid": "int8"}}],
        "healing": {},
    }
    configure(small, "parameters_variants", variants={"mixed": mixed})
    configure(small, "quality_gates", quality_gates={"variants": {}})
    shown = ok(hwpq(small, "variants")).stdout
    for word in ("int4", "int8", "healed"):
        assert word in shown


@pytest.mark.slow
def test_every_mistake_is_named_with_its_line(small):
    file = small / "conf" / "base" / "parameters_variants.yml"
    entries = {**VARIANTS, "a": {"description": "d", "quantization": {"grid": "int5"}}, "b": {"descriptoin": "d"}}
    file.write_text(yaml.safe_dump({"variants": entries}, sort_keys=False))
    lines = file.read_text().splitlines()
    done = hwpq(small, "variants")
    assert done.returncode == 1
    told = error_lines(done)
    grid = 1 + next(index for index, line in enumerate(lines) if "int5" in line)
    typo = 1 + next(index for index, line in enumerate(lines) if "descriptoin" in line)
    assert any(f"conf/base/parameters_variants.yml:{grid}: variants.a.quantization.grid" in line for line in told)
    assert any(f"conf/base/parameters_variants.yml:{typo}: variants.b.descriptoin" in line for line in told)
    # `kedro run` points at the same line, before it has run anything.
    run = kedro(small, "--pipelines", "select")
    assert run.returncode == 1
    assert any(
        f"conf/base/parameters_variants.yml:{grid}: variants.a.quantization.grid" in line for line in error_lines(run)
    )


@pytest.mark.slow
def test_compare_shows_what_was_evaluated(small):
    (small / "data" / "08_reporting" / "dense" / "metrics.json").unlink()
    shown = ok(hwpq(small, "compare")).stdout
    figures = json.loads((small / "data" / "08_reporting" / EWMA / "metrics.json").read_text())
    assert f"{figures['perplexity']:.2f}" in shown
    assert "Not evaluated yet: dense" in shown
    (small / "data" / "08_reporting" / "dense" / "metrics.json.crc32").unlink()  # what follows was written by hand
    for text, told in {
        "": "cannot be read",
        "{": "cannot be read",
        "{}": "no perplexity",
        "null": "no perplexity",
    }.items():
        (small / "data" / "08_reporting" / "dense" / "metrics.json").write_text(text)
        done = hwpq(small, "compare")
        assert done.returncode == 1
        (line,) = error_lines(done)
        assert line.startswith(f"error: metrics of dense: {told}")
    for file in (small / "data" / "08_reporting").glob("*/metrics.json"):
        file.unlink()
    done = hwpq(small, "compare")
    assert done.returncode == 1
    assert "kedro run" in error_lines(done)[0]


@pytest.mark.slow
def test_plan_knows_the_bytes_before_they_are_there(small_project):
    from hwpq_pipeline.checkpoints.reader import Checkpoint
    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.planning.shapes import read_shapes
    from hwpq_pipeline.planning.sizes import export_bytes

    shown = ok(hwpq(small_project, "plan")).stdout
    shapes = read_shapes(small_project / "data" / "01_raw" / "model")
    statistics = small_project / "data" / "03_primary" / "statistics"
    measured = sum(file.stat().st_size for file in statistics.glob("*.safetensors"))
    assert 4 * shapes.inputs == pytest.approx(measured, rel=0.1)
    assert "calibration.keep: auto they are kept." in " ".join(shown.split())
    for name, entry in VARIANTS.items():
        assert name in shown
        exported = Checkpoint(small_project / "data" / "07_export" / name)
        tensors = sum(exported.tensor(tensor).nbytes for tensor in exported.names)
        stored = exported.tensor("model.embed_tokens.weight").element_size()
        planned = export_bytes(shapes, Recipe.from_variant(entry))
        planned += (stored - 2) * (shapes.others + (0 if name != "dense" else shapes.weights))
        assert planned == pytest.approx(tensors, rel=0.05)
    for word in ("calibrate", f"compress of {EWMA}", "peak memory, GB", "seconds", "This machine:"):
        assert word in shown


@pytest.mark.slow
def test_the_report_shows_the_plan_of_the_run_beside_what_was_measured(small_project):
    planned = json.loads((small_project / "data" / "02_intermediate" / "plan.json").read_text())
    figures = json.loads((small_project / "data" / "08_reporting" / EWMA / "metrics.json").read_text())
    page = (small_project / "data" / "09_comparison" / "index.html").read_text()
    need = next(need for need in planned if (need["variant"], need["stage"]) == (EWMA, "compress"))
    memory = (need["memory"], figures["peak_rss_bytes"]["compress"])
    shown = "".join(f"<td>{value / 1e9:.2f}</td>" for value in memory)
    assert f"<td>compress</td>{shown}" in page


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_it_starts_with_what_to_change(small):
    configure(small, "parameters", calibration={"samples": 10**9, "length": 64, "seed": 0})
    sequential = {**VARIANTS["2of4-fp8"], "recovery": {"preset": "quality"}}
    configure(small, "parameters_variants", variants={**VARIANTS, "2of4-fp8": sequential})
    statistics = small / "data" / "03_primary" / "statistics" / "index.json"
    before = statistics.stat().st_mtime_ns
    done = kedro(small, "--pipelines", "calibrate,compress")
    assert done.returncode == 1
    calibrate, compress = error_lines(done)
    for line, stage, remedy in ((calibrate, "calibrate", "move the project"), (compress, "2of4-fp8", "set TMPDIR")):
        assert stage in line
        assert "GB of temporary files" in line
        assert f"Take fewer samples, or {remedy} to a larger disk." in line
    assert statistics.stat().st_mtime_ns == before
    ok(kedro(small, "--pipelines", "export", "--namespaces", f"variants.{EWMA}"))  # it runs none of what is too large


@pytest.mark.slow
def test_pipelines_run_alone_and_give_the_same_bytes(small):
    folders = [small / "data" / layer / EWMA for layer in ("05_selection", "06_models", "07_export")]
    weights = [file for folder in folders for file in folder.rglob("*.safetensors")]
    assert len({file.relative_to(small / "data").parts[0] for file in weights}) == len(folders)
    before = [file.read_bytes() for file in weights]
    for folder in folders:
        shutil.rmtree(folder)
    ok(kedro(small, "--pipelines", "select,compress,export", "--namespaces", f"variants.{EWMA}"))
    assert [file.read_bytes() for file in weights] == before


def test_lines_are_those_of_the_configuration_that_has_most_of_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, local = Path("conf/base"), Path("conf/local")
    for folder in (base, local):
        folder.mkdir(parents=True)
    (base / "parameters.yml").write_text("model:\n  name: x\n\ntrack:\n  experiment: e\n")
    (local / "parameters_more.yml").write_text("# first\ntrack:\n  a: 1\n  b:\n    c: 2\n")
    assert find_line(("model", "name"), None) == f"{base}/parameters.yml:2"
    assert find_line(("track", "b", "c"), None) == f"{local}/parameters_more.yml:5"
    assert find_line(("track", "b", "missing"), None) == f"{local}/parameters_more.yml:4"
    assert find_line(("track", "experiment"), None) == f"{base}/parameters.yml:5"
    assert find_line(("track",), None) == f"{local}/parameters_more.yml:2"
    assert find_line(("nothing",), None) is None
