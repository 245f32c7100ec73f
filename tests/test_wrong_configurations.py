"""Wrong configurations: each ends in a line that names the place, and nothing is computed.

The files are read and checked in this process, through the door that the command uses; a few go through the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hwpq_pipeline.configuration import mistakes, read_yaml
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.messages import explain
from hwpq_pipeline.project import load_parameters, variant_names
from tests.conftest import copy_project, run_in

LOCAL = "conf/local/parameters.yml"
VARIANTS = "conf/local/parameters_variants.yml"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


def entry(**sections: Any) -> str:
    return yaml.safe_dump({"variants": {"broken": {"description": "d", **sections}}})


def section(name: str, **values: Any) -> str:
    return yaml.safe_dump({name: values})


SPARSE = {"structure": "2of4"}
#: File, what is written there, and what the line says.
WRONG: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    # what is no YAML, or none of ours
    "duplicate key": (LOCAL, "calibration:\n  samples: 4\n  samples: 5\n", (f"{LOCAL}:3", "stands in line 2 already")),
    "duplicate section": (LOCAL, "track: {}\ntrack: {}\n", (f"{LOCAL}:2", "'track'")),
    "tab": (LOCAL, "calibration:\n\tsamples: 4\n", (f"{LOCAL}:2", "not valid YAML")),
    "unclosed bracket": (LOCAL, "report:\n  prompts: [a, b\n", (f"{LOCAL}:3", "not valid YAML")),
    "unclosed quote": (LOCAL, 'model:\n  name: "x\n', (LOCAL, "not valid YAML")),
    "two documents": (LOCAL, "model: {}\n---\nmodel: {}\n", (LOCAL, "not valid YAML")),
    "not UTF-8": (LOCAL, b"model:\n  name: \xff\xfe\n", (f"{LOCAL}:2", "not UTF-8")),
    "NUL": (LOCAL, b"model:\n  name: a\x00b\n", (f"{LOCAL}:2", "does not allow")),
    "python tag": (LOCAL, "model: !!python/object/apply:os.system [x]\n", (f"{LOCAL}:1", "!!python", "not allowed")),
    "own tag": (LOCAL, "model: !env x\n", (f"{LOCAL}:1", "!env")),
    "binary": (LOCAL, "model:\n  name: !!binary aGk=\n", (f"{LOCAL}:2", "!!binary")),
    "list at the top": (LOCAL, "- model\n- corpus\n", (f"{LOCAL}:1", "`key: value`")),
    "word at the top": (LOCAL, "model\n", (f"{LOCAL}:1", "`key: value`")),
    "billion laughs": (LOCAL, BOMB, (LOCAL, "expand to more than")),
    "anchor in itself": (LOCAL, "model: &a\n  name: *a\n", (LOCAL, "holds itself")),
    "unknown anchor": (LOCAL, "model: *nothing\n", (f"{LOCAL}:1", "nothing")),
    "deep": (LOCAL, "model: " + "[" * 400 + "]" * 400, (LOCAL, "nested too deeply")),
    "very deep": (LOCAL, "model: " + "[" * 9000 + "]" * 9000, (LOCAL, "nested too deeply")),
    "too large": (LOCAL, "# " + "x" * 1_100_000, (LOCAL, "bytes")),
    "interpolation": (LOCAL, "model:\n  name: ${oops}\n", ("oops",)),
    "interpolation's grammar": (LOCAL, "model:\n  name: ${\n", (LOCAL,)),
    "number as a name": (VARIANTS, "variants:\n  8: {description: d}\n", (f"{VARIANTS}:2", "'8' is no name")),
    "true as a name": (VARIANTS, "variants:\n  true: {description: d}\n", (f"{VARIANTS}:2", "'true' is no name")),
    "null as a name": (VARIANTS, "variants:\n  null: {description: d}\n", (f"{VARIANTS}:2", "'null' is no name")),
    "list as a name": (VARIANTS, "variants:\n  [a]: {description: d}\n", (f"{VARIANTS}:2", "is no name")),
    # sections and keys
    "misspelt section": (LOCAL, "calibraton: {samples: 4}\n", (f"{LOCAL}:1", "Did you mean calibration?")),
    "section of nothing": (LOCAL, "calibration: ~\n", (f"{LOCAL}:1", "calibration")),
    "section is a list": (LOCAL, "calibration: [4, 256]\n", (f"{LOCAL}:1", "calibration")),
    "misspelt key": (LOCAL, section("calibration", sampels=4), (f"{LOCAL}:2", "Did you mean samples?")),
    "misspelt key of a variant": (
        VARIANTS, entry(quantisation={"grid": "int8"}), (f"{VARIANTS}:4", "Did you mean quantization?")
    ),
    "misspelt key below": (
        VARIANTS, entry(quantization={"grid": "int8", "metod": "nearest"}), (VARIANTS, "Did you mean method?")
    ),
    "no variants": (VARIANTS, "variants: {}\n", ("no variants",)),
    "variants are a list": (VARIANTS, "variants: [fp8]\n", ("no variants",)),
    "empty variant": (VARIANTS, "variants:\n  fp8:\n", ("variants.fp8", "empty")),
    "name with a slash": (VARIANTS, "variants:\n  a/b: {description: d}\n", ("'a/b' cannot name a variant",)),
    "name with a dot": (VARIANTS, "variants:\n  a.b: {description: d}\n", ("'a.b' cannot name a variant",)),
    "name of nothing": (VARIANTS, 'variants:\n  "": {description: d}\n', ("cannot name a variant",)),
    "name of dots": (VARIANTS, "variants:\n  ..: {description: d}\n", ("cannot name a variant",)),
    "no description": (VARIANTS, "variants:\n  x:\n    quantization: {grid: int8}\n", (f"{VARIANTS}:2", "description")),
    # numbers
    "negative seed": (LOCAL, section("calibration", seed=-1), (f"{LOCAL}:2", "calibration.seed")),
    "huge seed": (LOCAL, section("evaluation", seed=2**70), ("evaluation.seed",)),
    "no samples": (LOCAL, section("calibration", samples=0), ("calibration.samples",)),
    "half a sample": (LOCAL, section("calibration", samples=2.5), ("calibration.samples",)),
    "length of text": (LOCAL, section("calibration", length="long"), ("calibration.length",)),
    "short length": (LOCAL, section("evaluation", length=4), ("evaluation.length",)),
    "no batch": (LOCAL, section("evaluation", batch=0), ("evaluation.batch",)),
    "unknown mode": (LOCAL, section("calibration", mode="grams"), ("calibration.mode", "gram")),
    "unknown dtype": (LOCAL, section("evaluation", dtype="float16"), ("evaluation.dtype",)),
    "unknown device": (LOCAL, section("compute", device="tpu"), ("compute.device",)),
    "unknown format": (LOCAL, section("export", formats=["ggml"]), ("export.formats", "ggml")),
    "bad repository": (LOCAL, section("export", push_to_hub="nobody"), ("export.push_to_hub",)),
    "no prompts": (LOCAL, section("report", prompts=[""]), ("report.prompts",)),
    "sparsity of one": (
        VARIANTS, entry(selection={"structure": "unstructured", "sparsity": 1.0}), ("selection.sparsity",)
    ),
    "sparsity of no number": (
        VARIANTS, entry(selection={"structure": "unstructured", "sparsity": float("nan")}), ("selection.sparsity",)
    ),
    "infinite multiplier": (
        VARIANTS, entry(selection={"structure": "unstructured", "multiplier": float("inf")}), ("selection.multiplier",)
    ),
    "negative multiplier": (
        VARIANTS, entry(selection={"structure": "unstructured", "multiplier": -1}), ("selection.multiplier",)
    ),
    "infinite damping": (
        VARIANTS, entry(selection=SPARSE, recovery={"damping": float("inf")}), ("recovery.damping",)
    ),
    "alpha of two": (
        VARIANTS, entry(selection={"structure": "unstructured", "sparsity": 0.5, "alpha": 2}), ("selection.alpha",)
    ),
    # contradictions
    "2:4 with a sparsity": (VARIANTS, entry(selection={**SPARSE, "sparsity": 0.7}), ("fixes the sparsity",)),
    "nothing selects": (VARIANTS, entry(selection={"structure": "unstructured"}), ("exactly one of",)),
    "recovery alone": (VARIANTS, entry(recovery={"steps": 5}), ("recovery mends what selection prunes",)),
    "unknown grid": (VARIANTS, entry(quantization={"grid": "int5"}), (f"{VARIANTS}:5", "'int4'")),
    "no group": (VARIANTS, entry(quantization={"grid": "int4"}), ("needs group_size",)),
    "odd group": (VARIANTS, entry(quantization={"grid": "int4", "group_size": 48}), ("needs group_size",)),
    "group of a channel": (VARIANTS, entry(quantization={"grid": "int8", "group_size": 64}), ("remove group_size",)),
    "in sequence of nothing": (VARIANTS, entry(sequential=True), ("sequential",)),
    "source without its place": (LOCAL, "model: {kind: directory, name: x}\n", ("model", "needs path")),
    "source of no kind": (LOCAL, "corpus: {kind: cloud, name: x}\n", ("corpus.kind", "cloud")),
    "source with too much": (LOCAL, "model: {kind: hub, name: x, repo: a/b, path: p}\n", ("does not take path",)),
    "short digest": (LOCAL, section("model", sha256="abc"), ("model.sha256",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("wrong") / "project")


def told(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a run in the project would end in."""
    monkeypatch.chdir(project)
    try:
        parameters = load_parameters()
        found = mistakes(parameters, None)
        if found:
            raise ExceptionGroup("the configuration", found)
        variant_names(parameters["variants"])
    except Exception as error:  # noqa: BLE001 (whatever ends a run)
        return explain(error)
    return []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_a_line(project: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place, content, expected = WRONG[name]
    file = project / place
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        (line,) = told(project, monkeypatch)
    finally:
        file.unlink()
    assert "\n" not in line
    assert len(line) < 400
    for text in expected:
        assert text in line


def test_there_are_sixty_and_the_shipped_one_is_right(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(WRONG) >= 60
    assert told(project, monkeypatch) == []


def test_every_mistake_has_its_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project / LOCAL
    file.write_text("calibration:\n  samples: 0\n  sed: 1\nevaluaton: {}\n")
    try:
        lines = told(project, monkeypatch)
    finally:
        file.unlink()
    assert [line.split(": ")[0] for line in lines] == [f"{LOCAL}:4", f"{LOCAL}:2", f"{LOCAL}:3"]


def test_an_environment_changes_keys_and_replaces_tables(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    base = load_parameters("base")
    (project / LOCAL).write_text(
        "calibration: {samples: 64}\nmodel: {name: mine}\ncorpus: {kind: local, name: x, path: p}\n"
    )
    (project / VARIANTS).write_text("variants: {mine: {description: d}}\n")
    try:
        local = load_parameters()
    finally:
        (project / LOCAL).unlink()
        (project / VARIANTS).unlink()
    assert local["calibration"] == {**base["calibration"], "samples": 64}
    assert local["model"] == {**base["model"], "name": "mine"}
    assert local["corpus"] == {"kind": "local", "name": "x", "path": "p"}  # of another kind: nothing is left of the old
    assert list(local["variants"]) == ["mine"]
    assert local["evaluation"] == base["evaluation"]


def test_merge_keys_and_anchors_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text("a: &a\n  x: 1\nb:\n  <<: *a\n  y: 2\n")
    assert read_yaml(file) is not None
    file.write_text("")
    assert read_yaml(file) is None
    with pytest.raises(HwpqError, match="cannot be read"):
        read_yaml(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--env", "bse"), ("conf/bse", "Did you mean base?")),
        (("--nodes", "fetch_modle"), ("fetch_modle", "Did you mean fetch_model?")),
        (("--to-outputs", "modle"), ("modle", "Did you mean model?")),
        (("--tags", "none"), ("no nodes",)),
        (("--runner", "SequentialRuner"), ("SequentialRuner",)),
        (("--params", "calibration.sampels=4"), ("calibration.sampels", "Did you mean samples?")),
    ],
)
def test_a_wrong_argument_is_a_line(project: Path, arguments: tuple[str, ...], expected: tuple[str, ...]) -> None:
    done = run_in(project, "kedro", "run", *arguments, warm=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "Error: "))]
    for text in expected:
        assert text in line
    assert not (project / "data").exists() or not [path for path in (project / "data").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("variants: {a: {quantization: {grid: [int3}}}\n", "not valid YAML"),
        ("variants:\n\ta: {}\n", "not valid YAML"),
        ("variants: {}\nvariants: {}\n", "stands in line 1 already"),
        ("variants: !!python/object:os.system {}\n", "is not allowed"),
    ],
)
def test_a_file_that_is_no_yaml_is_a_line_by_the_command(project: Path, broken: str, said: str) -> None:
    """Every hook that reads parameters comes after the one that checks them."""
    (project / "conf" / "base" / "parameters_variants.yml").write_text(broken)
    done = run_in(project, "kedro", "run", "--pipelines", "recipes", warm=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: conf/base/parameters_variants.yml:")
    assert said in line
