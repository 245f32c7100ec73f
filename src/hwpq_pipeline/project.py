"""The project's configuration where Kedro hands none: which variants there are, and where the project lies.

`register_pipelines` takes no argument, yet its pipelines follow the variants of the environment that runs
(`--env`, `--params`). A hook notes the context's configuration before Kedro asks for the pipelines; without
a context (`kedro registry list`) the configuration is read as Kedro would.
"""

from __future__ import annotations

import os
import re
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl

from hwpq_pipeline.errors import HwpqError

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
_WHERE = "parameters_variants.yml"


class ProjectHooks:
    """Notes the configuration of the context that is about to run."""

    parameters: dict[str, Any] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro's hook: the context is there, the pipelines are not asked for yet."""
        ProjectHooks.parameters = context.config_loader["parameters"]
        os.chdir(context.project_path)  # relative paths in parameters mean the project


def variant_names() -> list[str]:
    """Names of the variants, in the order of the configuration.

    Raises:
        HwpqError: there is none, or a name cannot be a namespace and a directory.
    """
    parameters = ProjectHooks.parameters
    if parameters is None:
        parameters = OmegaConfigLoader("conf", env=os.getenv("KEDRO_ENV"), base_env="base", default_run_env="local")[
            "parameters"
        ]
    variants = parameters.get("variants")
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
