"""The project's configuration in places where Kedro does not pass it: the list of variants, the project's folder.

`register_pipelines` takes no argument, but its pipelines depend on the variants of the environment that runs (`--env`,
`--params`). A hook keeps the context's configuration before Kedro asks for the pipelines. Without a context
(`kedro registry list`) the configuration is read in the way Kedro reads it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, DatasetError

from hwpq_pipeline.errors import HwpqError

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
_WHERE = "parameters_variants.yml"
#: Kedro's own patterns, and the gates' file: those who set limits are not those who make variants.
CONFIG_PATTERNS = {"parameters": ["parameters*", "parameters*/**", "**/parameters*", "quality_gates*"]}


class ProjectHooks:
    """Keeps the configuration of the context that is about to run."""

    parameters: dict[str, Any] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro calls it when the context exists, before it asks for the pipelines."""
        ProjectHooks.parameters = context.config_loader["parameters"]
        os.chdir(context.project_path)  # relative paths in parameters mean the project


def load_parameters(env: str | None = None) -> dict[str, Any]:
    """The parameters of the project in the working directory, as Kedro reads them."""
    loader = OmegaConfigLoader(
        "conf", env=env or os.getenv("KEDRO_ENV"), base_env="base", default_run_env="local",
        config_patterns=CONFIG_PATTERNS,
    )  # fmt: skip
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
