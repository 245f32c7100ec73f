"""The project's configuration where Kedro hands none: which variants there are, and where the project lies.

`register_pipelines` takes no argument, yet its pipelines follow the variants of the environment that runs
(`--env`, `--params`). A hook notes the context's configuration before Kedro asks for the pipelines; without
a context (`kedro registry list`) the configuration is read as Kedro would.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline.node import Node

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.connection import resolve_uri
from hwpq_pipeline.tracking.failures import log_failure

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
_WHERE = "parameters_variants.yml"
#: Kedro's own patterns and the gates: a file of their own, since who sets limits is not who makes variants.
CONFIG_PATTERNS = {"parameters": ["parameters*", "parameters*/**", "**/parameters*", "quality_gates*"]}


class ProjectHooks:
    """Notes the configuration of the context that is about to run."""

    parameters: dict[str, Any] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro's hook: the context is there, the pipelines are not asked for yet."""
        ProjectHooks.parameters = context.config_loader["parameters"]
        os.chdir(context.project_path)  # relative paths in parameters mean the project

    @hook_impl
    def on_node_error(self, error: Exception, node: Node) -> None:
        """Kedro's hook: a variant that cannot be made is a failed run in MLflow, beside those that could."""
        track = (ProjectHooks.parameters or {}).get("track")
        _, _, variant = (node.namespace or "").partition("variants.")
        stage = node.name.rpartition(".")[2]
        if not variant or not track or stage == "log":  # what fails while it is logged has its run
            return
        try:
            log_failure(
                variant, stage, error, experiment=track["experiment"], tracking_uri=resolve_uri(track["tracking_uri"])
            )
        except HwpqError as problem:
            logger.warning("The failure was not logged: %s", problem)


def load_parameters(env: str | None = None) -> dict[str, Any]:
    """The parameters as Kedro reads them, in the working directory."""
    loader = OmegaConfigLoader(
        "conf", env=env or os.getenv("KEDRO_ENV"), base_env="base", default_run_env="local",
        config_patterns=CONFIG_PATTERNS,
    )  # fmt: skip
    parameters: dict[str, Any] = loader["parameters"]
    return parameters


def bootstrap() -> None:
    """Make the working directory the Kedro project.

    Raises:
        HwpqError: it is none.
    """
    from kedro.framework.startup import bootstrap_project

    if not Path("pyproject.toml").is_file() or not Path("conf").is_dir():
        raise HwpqError("no project here", where=str(Path.cwd()), remedy="Start it in the project's root")
    bootstrap_project(Path.cwd())


def open_catalog(env: str | None = None) -> CatalogProtocol[Any, Any]:
    """The catalog of the project in the working directory."""
    from kedro.framework.session import KedroSession

    with KedroSession.create(project_path=Path.cwd(), env=env) as session:
        context: KedroContext = session.load_context()  # type: ignore[attr-defined]  # of a session with context
        return context.catalog


def variant_names(variants: Any = None) -> list[str]:
    """Names of the variants, in the order of the configuration.

    Args:
        variants: the entries; those of the configuration by default.

    Raises:
        HwpqError: there is none, or a name cannot be a namespace and a directory.
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
                remedy="Use letters, digits, - and _, and begin with a letter or digit",
            )
        if not isinstance(entry, dict):
            raise HwpqError(
                "it has no content", where=f"{_WHERE}: variants.{name}", remedy="Give it at least a description"
            )
    return [str(name) for name in variants]
