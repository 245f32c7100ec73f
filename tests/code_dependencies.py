"""The code that each DVC stage depends on, from the imports: `make dvc-dependencies` writes it into dvc.yaml.

A stage depends on every module that its nodes import, directly or not. A room that is imported whole stands as its
folder, else its modules stand one by one, so that a change makes no stage stale that does not use it. Kernels are the
exception: they choose their implementation when they run, so a stage that computes with them depends on all of them.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hwpq_pipeline"
#: A change here changes no result, so it makes no stage stale. Some of them need a reason. `parameters` and `variant`:
#: what they fill in stands in conf/base in full (tests/test_parameters.py), or in the recipes. `method.recipe`, its
#: sections and presets: their numbers reach the stages as `data/04_recipes`, whose stage depends on them.
RECIPES = {"hwpq_pipeline.method.presets", "hwpq_pipeline.method.recipe", "hwpq_pipeline.method.sections"}
NO_DEPENDENCY = {
    "hwpq_pipeline", "hwpq_pipeline.errors", "hwpq_pipeline.parameters", "hwpq_pipeline.variant",
    "hwpq_pipeline.measuring", "hwpq_pipeline.pipelines", "hwpq_pipeline.pipelines.variants", "hwpq_pipeline.progress",
    *RECIPES,
}  # fmt: skip
CHECKED = ("hwpq_pipeline.parameters", "hwpq_pipeline.variant")
RECIPES_DEPEND_ON = {*CHECKED, *RECIPES}


def modules_of(pipeline: str) -> set[str]:
    """Paths of the modules that a pipeline's nodes import, as `src/…/x.py`."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    graph.remove_import(importer="hwpq_pipeline.errors", imported="hwpq_pipeline.inert")  # an error's letters
    if pipeline != "recipes":  # what the parameters import, they import to check words
        for module in CHECKED:
            graph.remove_module(module)
    else:  # which export formats there are is in no recipe
        graph.remove_import(importer="hwpq_pipeline.parameters", imported="hwpq_pipeline.export.formats")
    nodes = f"{PACKAGE}.pipelines.{pipeline}.nodes"
    free = NO_DEPENDENCY - RECIPES_DEPEND_ON if pipeline == "recipes" else NO_DEPENDENCY
    modules = ({nodes} | graph.find_upstream_modules(nodes)) - free
    return {path for path in (f"src/{module.replace('.', '/')}.py" for module in modules) if (ROOT / path).is_file()}


def dependencies_of(pipeline: str) -> list[str]:
    """The same with whole rooms as folders, sorted: what stands in dvc.yaml."""
    modules = modules_of(pipeline)
    found = set()
    for module in modules:
        parts = PurePosixPath(module).parts[2:]
        room = PurePosixPath("src", PACKAGE, *parts[: 2 if parts[0] == "pipelines" else 1]).as_posix()
        whole = (ROOT / room).is_dir() and all(
            file.relative_to(ROOT).as_posix() in modules
            for file in (ROOT / room).rglob("*.py")
            if file.name != "__init__.py"
        )
        runs_kernels = parts[0] == "kernels" and module != f"src/{PACKAGE}/kernels/devices.py"
        found.add(room if whole or (parts[0] == "pipelines" and (ROOT / room).is_dir()) or runs_kernels else module)
    return sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found))


def rewritten(text: str) -> str:
    """dvc.yaml with the code of every stage anew; data, comments and order stay."""
    lines: list[str] = []
    pipeline, inside = "", None
    for line in text.splitlines():
        if stage := re.match(r"^  (\w+):$", line):
            pipeline = stage[1]
        indent = len(line) - len(line.lstrip())
        if inside is not None and not (indent > inside and line.lstrip().startswith("- ")):
            lines += [f"{' ' * (inside + 2)}- {path}" for path in dependencies_of(pipeline)]
            inside = None
        if inside is None or "- src/" not in line:
            lines.append(line)
        if line.strip() == "deps:":
            inside = indent
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    file = ROOT / "dvc.yaml"
    file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")
