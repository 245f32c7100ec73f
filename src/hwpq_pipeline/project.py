"""The project's configuration in places where Kedro does not pass it: the list of variants, the project's folder.

`register_pipelines` takes no argument, but its pipelines depend on the variants of the environment that runs (`--env`,
`--params`). A hook keeps the context's configuration before Kedro asks for the pipelines. Without a context
(`kedro registry list`) the configuration is read in the way Kedro reads it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, DatasetError
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from hwpq_pipeline.configuration import check_files, mistakes
from hwpq_pipeline.errors import HwpqError

#: Where a project's data lie, in the catalog.
DATA = Path("data")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
_WHERE = "parameters_variants.yml"
logger = logging.getLogger(__name__)
#: Kedro's own patterns, and the gates' file: those who set limits are not those who make variants.
CONFIG_PATTERNS = {"parameters": ["parameters*", "parameters*/**", "**/parameters*", "quality_gates*"]}


#: Sections of the parameters that an environment replaces whole; the others it changes key by key.
_WHOLE = ("variants", "quality_gates")


class ProjectLoader(OmegaConfigLoader):
    """Kedro's loader, where an environment may name a part of a section: `calibration: {samples: 64}`.

    A table of variants or gates replaces the base's, since no key says that an entry is not wanted. So does a source
    that names its `kind`: another kind takes other keys.
    """

    def _merge_configs(self, config: dict[str, Any], env_config: dict[str, Any], key: str, env_path: str) -> Any:
        if key != "parameters":
            return super()._merge_configs(config, env_config, key, env_path)
        merged = dict(config)
        for name, section in env_config.items():
            old = config.get(name)
            keep = isinstance(section, dict) and isinstance(old, dict) and name not in _WHOLE and "kind" not in section
            merged[name] = {**old, **section} if keep else section  # type: ignore[dict-item]  # a dict, as tested
        return merged


class ProjectHooks:
    """Checks the configuration of the context that is about to run, and keeps it."""

    parameters: dict[str, Any] | None = None
    _unfitted = False
    _variants: Sequence[str] = ()
    _stages: frozenset[tuple[str, str]] = frozenset()

    @hook_impl(tryfirst=True)  # pluggy would call the hooks that read parameters before this one checks them
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro calls it when the context exists, before it asks for the pipelines.

        Raises:
            HwpqError: a file that is no YAML.
            ExceptionGroup: of mistakes in the parameters.
        """
        os.chdir(context.project_path)  # relative paths in parameters mean the project
        check_files(context.env)
        parameters = context.config_loader["parameters"]
        if found := mistakes(parameters, context.env):
            raise ExceptionGroup("the configuration", found)
        ProjectHooks.parameters = parameters
        self._unfitted = True

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Kedro calls it when it knows what runs: the variants that it is for, and their stages."""
        stages = [(_stage_of(node), _variant_of(node)) for node in pipeline.nodes]
        self._variants = list(dict.fromkeys(variant for _, variant in stages if variant))
        self._stages = frozenset(stages)

    @hook_impl
    def before_node_run(self, inputs: dict[str, Any]) -> None:
        """Kedro calls it before each node: before the first one that works on the model, all variants are held to it.

        So are the stages that are about to run to what this machine has.

        Raises:
            ExceptionGroup: of layers that a variant does not fit, or of stages that do not fit this machine.
        """
        if not self._unfitted or "model" not in inputs or not Path(str(inputs["model"])).is_dir():
            return
        self._unfitted = False
        model, parameters = Path(inputs["model"]), self.parameters or {}
        entries = parameters.get("variants") or {}
        entries = {name: entries[name] for name in self._variants or entries}
        if found := unfitting(model, entries):
            raise ExceptionGroup("the variants", found)
        if found := unaffordable(model, entries, parameters, self._stages):
            raise ExceptionGroup("the machine", found)


def _stage_of(node: Node) -> str:
    """The pipeline that a node belongs to: the folder of its function."""
    return str(node.func.__module__).split(".")[-2]


def _variant_of(node: Node) -> str:
    """The variant that a node works on; empty if it is for all."""
    _, _, inside = str(node.namespace or "").partition("variants.")
    return inside.partition(".")[0]


def unaffordable(
    model: Path, entries: Mapping[str, Any], parameters: Mapping[str, Any], stages: frozenset[tuple[str, str]]
) -> list[HwpqError]:
    """Why stages that are about to run cannot fit this machine; what is tight alone is logged.

    Args:
        model: the dense checkpoint.
        entries: the variants'.
        parameters: of the project.
        stages: pipelines that run, each with its variant or an empty name.
    """
    from hwpq_pipeline.forecast import forecast
    from hwpq_pipeline.planning.limits import this_machine, tight, too_large

    try:
        needs = forecast(model, entries, parameters, timed=False)
    except HwpqError:  # the stage that needs what is missing says it better
        return []
    part_of = {"formats": "export"}
    runs = [
        need
        for need in needs
        if need.stage != "fetch" and (part_of.get(need.stage, need.stage), need.variant or "") in stages
    ]
    machine = this_machine(DATA)
    for line in tight(runs, machine):
        logger.warning("%s.", line)
    return too_large(runs, machine)


def unfitting(model: Path, entries: Mapping[str, Any]) -> list[HwpqError]:
    """Layers of a model that variants do not fit; none if the model cannot be read, which its reader says better."""
    from hwpq_pipeline.checkpoints.layers import layer_map
    from hwpq_pipeline.method.fitting import misfits
    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.planning.shapes import read_shapes
    from hwpq_pipeline.planning.sizes import out_of_reach

    try:
        layers, shapes = layer_map(model), read_shapes(model)
    except HwpqError:
        return []
    found: list[HwpqError] = []
    for name, entry in entries.items():
        recipe, where = Recipe.from_variant(entry), f"variants.{name}"
        wrong = misfits(recipe, layers, where)
        beyond = None if wrong else out_of_reach(shapes, recipe, where)
        found += wrong if beyond is None else [beyond]
    return found


def load_parameters(env: str | None = None) -> dict[str, Any]:
    """The parameters of the project in the working directory, as Kedro reads them.

    Raises:
        HwpqError: a file that is no YAML.
    """
    env = env or os.getenv("KEDRO_ENV")
    check_files(env)
    loader = ProjectLoader("conf", env=env, base_env="base", default_run_env="local", config_patterns=CONFIG_PATTERNS)
    parameters: dict[str, Any] = loader["parameters"]
    return parameters


def bootstrap() -> None:
    """Make the working directory the current Kedro project.

    Raises:
        HwpqError: it is not a project.
    """
    from kedro.framework.startup import bootstrap_project

    if not Path("pyproject.toml").is_file() or not Path("conf").is_dir():
        raise HwpqError("not a project", where=str(Path.cwd()), remedy="Run the command in the project's root")
    bootstrap_project(Path.cwd())


def open_catalog(env: str | None = None) -> CatalogProtocol[Any, Any]:
    """The catalog of the project in the working directory."""
    from kedro.framework.session import KedroSession

    with KedroSession.create(project_path=Path.cwd(), env=env) as session:
        context: KedroContext = session.load_context()  # type: ignore[attr-defined]  # of a session with context
        return context.catalog


def load_metrics(catalog: CatalogProtocol[Any, Any], variant: str) -> Any:
    """What a variant's `metrics.json` holds.

    Raises:
        HwpqError: it cannot be read: it is empty, cut off, or no JSON.
    """
    try:
        return catalog.load(f"variants.{variant}.metrics")
    except DatasetError as error:
        where = f"metrics of {variant}"
        raise HwpqError("cannot be read", where=where, remedy="Run the evaluate pipeline again.") from error


def variant_names(variants: Any = None) -> list[str]:
    """Names of the variants, in the configuration's order.

    Args:
        variants: the entries; by default those of the configuration.

    Raises:
        HwpqError: there are no variants, or a name cannot be a namespace and a directory.
    """
    if variants is None:
        parameters = ProjectHooks.parameters
        variants = (parameters if parameters is not None else load_parameters()).get("variants")
    if not isinstance(variants, dict) or not variants:
        raise HwpqError("no variants", where=_WHERE, remedy="Add an entry under `variants:`")
    for name, entry in variants.items():
        if not _NAME.match(str(name)):
            raise HwpqError(
                f"{name!r} cannot name a variant",
                where=_WHERE,
                remedy="Use letters, digits, - and _; begin with a letter or a digit",
            )
        if not isinstance(entry, dict):
            raise HwpqError(
                "the entry is empty", where=f"{_WHERE}: variants.{name}", remedy="Give it at least a description"
            )
    return [str(name) for name in variants]
