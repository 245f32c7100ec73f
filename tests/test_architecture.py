"""The rules of `docs/architecture.md` that a program can check: who may import what, and what is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = "hwpq_pipeline"
# The mathematics must run wherever torch does; llvmlite is numba's, triton only the CUDA kernels look for.
MATHEMATICS_MAY_IMPORT = {"llvmlite", "numba", "numpy", "torch", "triton", PACKAGE}


def imported_names(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield (file, line, top-level module) of each import below `folder` that the standard library lacks."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
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
        # triton comes with the CUDA builds of torch, and is imported behind a check.
        if name not in {PACKAGE, "triton"} and not declared & {normal(owner) for owner in owners.get(name, [name])}
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


def test_versions_agree(root: Path) -> None:
    from hwpq_pipeline import __version__

    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog


def test_telemetry_is_off(root: Path) -> None:
    assert (root / ".telemetry").read_text(encoding="utf-8").strip() == "consent: false"
