"""Rules that a program can check: who may import what, what is declared, how long files and functions are."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import date
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = "hwpq_pipeline"
# The mathematics must run wherever torch does. filelock is torch's own dependency and llvmlite numba's; triton only the
# CUDA kernels look for.
MATHEMATICS_MAY_IMPORT = {"filelock", "llvmlite", "numba", "numpy", "torch", "triton", PACKAGE}
# Each framework, and the modules that may import it; pyproject.toml's contracts must name all others.
MAY_KNOW = {
    "kedro": {
        "__main__", "cli", "commands", "datasets", "executing", "failures", "locking", "messages",
        "pipeline_registry", "pipelines", "project", "settings",
    },
    "mlflow": {"__main__", "tracking"},
}  # fmt: skip
# CONTRIBUTING.md names these limits; a function's signature and docstring do not count.
FILE_LINES, FUNCTION_LINES = 300, 40
LONGER_FUNCTIONS = {
    "src/hwpq_pipeline/kernels/ewma_select/triton_parts.py:run_pass",  # one loop over a row, whose state is 15 values
}


def imported_names(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield (file, line, top-level module) of each import below `folder` that the standard library lacks."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names:
                    yield file, node.lineno, top


def normal(name: str) -> str:
    """Return a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    """Return the normal names of requirement strings such as `torch==2.13.0`."""
    return {normal(re.match(r"[A-Za-z0-9._-]+", text).group()) for text in requirements}  # type: ignore[union-attr]


def test_import_contracts(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlinter.cli import lint_imports

    monkeypatch.chdir(root)
    # Its logging would switch off all loggers that exist, for the tests that follow.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    status = lint_imports(no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("room", ["compression", "kernels"])
def test_mathematics_imports_only_numerics(root: Path, room: str) -> None:
    found = list(imported_names(root / "src" / PACKAGE / room))
    assert found, f"no import found in {room}: is the folder right?"
    strangers = [f"{file}:{line} {name}" for file, line, name in found if name not in MATHEMATICS_MAY_IMPORT]
    assert not strangers, strangers


def test_imports_are_declared(root: Path) -> None:
    """What the package imports is a dependency of its own, not one that another happens to bring along."""
    metadata = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = requirement_names(metadata["dependencies"])
    owners = packages_distributions()
    undeclared = {
        f"{file.relative_to(root)}:{line} {name}"
        for file, line, name in imported_names(root / "src" / PACKAGE)
        # triton comes with the CUDA builds of torch, and is imported behind a check. vLLM imports its plugin, in an
        # environment of its own.
        if name not in {PACKAGE, "triton", "vllm"}
        and not declared & {normal(owner) for owner in owners.get(name, [name])}
    }
    assert not undeclared, sorted(undeclared)


def test_lock_is_whole_and_tied_to_no_machine(root: Path) -> None:
    metadata = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    odd = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert not odd, odd
    wanted = requirement_names(metadata["dependencies"] + metadata["optional-dependencies"]["dev"])
    assert wanted <= requirement_names(pins), wanted - requirement_names(pins)


def test_the_changelog_ends_at_the_version_that_the_package_has(root: Path) -> None:
    from hwpq_pipeline import __version__

    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert first == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in released]
    versions = [(match[1], date.fromisoformat(match[2])) for match in found if match]
    assert len(versions) == len(released)
    assert versions[0][0] == __version__


def test_kedro_sends_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's file withholds consent where no variable does; an empty folder does not."""
    from kedro_telemetry.api import send_telemetry_event

    sent: list[str] = []

    def send(event_name: str, **_: object) -> bool:
        sent.append(event_name)
        return True

    for variable in ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY", "GITHUB_REPOSITORY_OWNER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("kedro_telemetry.api._get_or_create_uuid", lambda: "nobody")
    monkeypatch.setattr("kedro_telemetry.api._send_heap_event", send)
    assert not send_telemetry_event("test", project_path=root)
    assert send_telemetry_event("control", project_path=tmp_path)
    assert sent == ["control"]


@pytest.mark.parametrize("framework", MAY_KNOW)
def test_the_contracts_name_every_module(root: Path, framework: str) -> None:
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [entry for entry in contracts if framework in entry.get("forbidden_modules", [])]
    package = root / "src" / PACKAGE
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    named = {name.removeprefix(f"{PACKAGE}.") for name in contract["source_modules"]}
    assert named == modules - MAY_KNOW[framework] - {"__init__"}


def test_tests_do_not_import_each_other(root: Path) -> None:
    """What two test modules share is a helper or a fixture: a changed test then breaks no other."""
    found = [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in sorted((root / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert not found, found


def lines_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last; a docstring is none."""
    first, *rest = function.body
    if ast.get_docstring(function) is not None:
        return (function.end_lineno or 0) - (first.end_lineno or 0) if rest else 0
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_files_and_functions_are_short(root: Path, folder: str) -> None:
    files = {file: file.read_text(encoding="utf-8") for file in sorted((root / folder).rglob("*.py"))}
    assert files
    long = {
        f"{file.relative_to(root)}:{node.name}": lines_of_body(node)
        for file, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of_body(node) > FUNCTION_LINES
    }
    assert set(long) == {name for name in LONGER_FUNCTIONS if name.startswith(folder)}, long
    lengths = {str(file.relative_to(root)): len(text.splitlines()) for file, text in files.items()}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}
