"""dvc.yaml against what it wires: the Kedro pipelines, the catalog and the imports of the code."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from hwpq_pipeline.datasets import AtomicDataset
from tests.code_dependencies import dependencies_of, modules_of

ROOT = Path(__file__).resolve().parents[1]
BASE = "conf/base/parameters.yml"
VARIANTS = "conf/base/parameters_variants.yml"
#: Stages that take a variant's entry and depend on its recipe instead: the entry with every number written out.
BY_RECIPE = ("select", "compress")
#: The default is all stages; a gate that fails would throw away the experiment that it judges (docs/decisions.md).
NO_STAGE = {"__default__", "gate"}
#: Stages over all variants, and the directories of the variants' files that they read.
OVER_ALL: dict[str, set[str]] = {
    "plan": set(),
    "recipes": set(),
    "report": {"data/04_recipes", "data/08_prompts", "data/08_reporting"},
    "track": {"data/07_export", "data/08_reporting", "data/09_comparison/charts"},
    "publish": {"data/07_export", "data/08_reporting"},
}
#: Directories that one stage writes for all variants.
WRITTEN_OVER_ALL = ("data/10_publish", "data/04_recipes", "data/09_comparison/charts")
#: Catalog entries that are working space, not data.
WORKING_SPACE = {"data/.cache", "data/.scratch", "data/.work"}


@pytest.fixture(scope="module")
def project():
    """Nodes and catalog, as `kedro run` would build them."""
    bootstrap_project(ROOT)
    with KedroSession.create(project_path=ROOT, env="base") as session:
        context = cast(KedroSession, session).load_context()
        return dict(pipelines), context.catalog, context.params["variants"]


def entries(section: list) -> list[str]:
    """Paths of a deps/outs/metrics/plots section, options dropped."""
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in section]


def stages() -> dict[str, dict]:
    """All stages by name, `foreach` unrolled by plain substitution."""
    text = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    names = yaml.safe_load((ROOT / VARIANTS).read_text())["variants"]
    unrolled = {}
    for name, stage in text["stages"].items():
        if "foreach" not in stage:
            unrolled[name] = stage
            continue
        assert stage["foreach"] == "${variants}"
        for variant in names:
            unrolled[f"{name}@{variant}"] = yaml.safe_load(yaml.safe_dump(stage["do"]).replace("${key}", variant))
    return unrolled


def part(project, stage: str):
    """The Kedro pipeline that a stage runs."""
    registered, _, _ = project
    name, _, variant = stage.partition("@")
    pipeline = registered[name]
    return pipeline.only_nodes_with_namespaces([f"variants.{variant}"]) if variant else pipeline


def files(project, names) -> set[str]:
    """Paths, relative to the project, of those datasets that are files or directories."""
    _, catalog, _ = project
    found = set()
    for name in names:
        dataset = None if name.startswith("params:") else catalog.get(name)
        if (place := getattr(dataset, "path", None)) is not None:
            path = Path(place)
            found.add((path.relative_to(ROOT) if path.is_absolute() else path).as_posix())
    return found - WORKING_SPACE


def checksums(project, names) -> set[str]:
    """Where the checksums of those datasets stand that have one beside the file."""
    _, catalog, _ = project
    return {
        f"{path}.crc32"
        for name in names
        if isinstance(catalog.get(name), AtomicDataset)
        for path in files(project, [name])
    }


STAGES = stages()


def test_every_pipeline_is_a_stage_and_every_stage_a_pipeline(project):
    registered, _, variants = project
    expected = set()
    for name, pipeline in registered.items():
        if name in NO_STAGE:
            continue
        per_variant = name not in OVER_ALL and any(node.namespace for node in pipeline.nodes)
        expected |= {f"{name}@{variant}" for variant in variants} if per_variant else {name}
    assert set(STAGES) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_command(stage):
    name, _, variant = stage.partition("@")
    command = f"kedro run --pipelines {name}" + (f" --namespaces variants.{variant}" if variant else "")
    assert STAGES[stage]["cmd"] == command


@pytest.mark.parametrize("stage", STAGES)
def test_data_dependencies(project, stage):
    pipeline = part(project, stage)
    wanted = files(project, pipeline.inputs())
    name, _, variant = stage.partition("@")
    if name in BY_RECIPE:
        assert f"params:variants.{variant}" in pipeline.inputs()
        wanted |= files(project, [f"variants.{variant}.recipe"])
    listed = (
        {path for path in entries(STAGES[stage]["deps"]) if path.startswith("data/")}
        if "deps" in STAGES[stage]
        else set()
    )
    if stage in OVER_ALL:  # DVC gets the directories that hold the variants' files
        folders = {path for path in listed if any(other.startswith(f"{path}/") for other in wanted)}
        assert folders == OVER_ALL[stage]
        wanted = {path for path in wanted if not any(path.startswith(f"{folder}/") for folder in folders)}
        listed -= folders
    assert listed == wanted


@pytest.mark.parametrize("stage", STAGES)
def test_outputs(project, stage):
    written = {name for node in part(project, stage).nodes for name in node.outputs}
    listed = [path for section in ("outs", "metrics", "plots") for path in entries(STAGES[stage].get(section, []))]
    wanted = files(project, written) | checksums(project, written)
    for folder in WRITTEN_OVER_ALL:
        inside = {path for path in wanted if path.startswith(f"{folder}/")}
        wanted = (wanted - inside) | ({folder} if inside else set())
    assert sorted(listed) == sorted(wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters(project, stage):
    wanted = {name.removeprefix("params:") for name in part(project, stage).inputs() if name.startswith("params:")}
    wanted -= {"compute"}  # of the machine, not of what is made
    name, _, variant = stage.partition("@")
    if name in BY_RECIPE:
        wanted.remove(f"variants.{variant}")
    listed = {key for section in STAGES[stage].get("params", []) for keys in section.values() for key in keys}
    if stage in OVER_ALL and {name for name in wanted if name.startswith("variants.")}:
        wanted = {name for name in wanted if not name.startswith("variants.")} | {"variants"}
    assert listed == wanted
    for section in STAGES[stage].get("params", []):
        for file, keys in section.items():
            assert all((file == VARIANTS) == key.startswith("variants") for key in keys)


@pytest.mark.parametrize("name", sorted({stage.partition("@")[0] for stage in STAGES}))
def test_code_dependencies_are_what_the_pipeline_imports(name):
    """`make dvc-dependencies` writes them."""
    stage = next(stage for stage in STAGES if stage.partition("@")[0] == name)
    listed = [path for path in entries(STAGES[stage]["deps"]) if path.startswith("src/")]
    assert listed == dependencies_of(name)
    # Every module is covered, and nothing is listed that is not used.
    modules = modules_of(name)
    assert all(any(module == path or module.startswith(f"{path}/") for path in listed) for module in modules)
    assert all(any(module == path or module.startswith(f"{path}/") for module in modules) for path in listed)


def test_every_listed_source_exists():
    for stage in STAGES.values():
        for path in entries(stage.get("deps", [])):
            assert not path.startswith("src/") or (ROOT / path).exists(), path
