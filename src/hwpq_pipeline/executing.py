"""A Kedro hook: the engine that the parameters name serves the run."""

from __future__ import annotations

import atexit
from contextlib import ExitStack

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl

from hwpq_pipeline.execution.engines import opened
from hwpq_pipeline.parameters import Execution


class ExecutionHooks:
    """Opens the engine before the first node, and closes it after the last."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        atexit.register(self._opened.close)  # where a run ends before Kedro can tell
        self._execution: dict[str, object] = {}

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro calls it when the context exists: it says which engine is wanted."""
        self._execution = context.config_loader["parameters"].get("execution") or {}

    @hook_impl
    def before_pipeline_run(self) -> None:
        """Kedro calls it when it knows what runs."""
        self._opened.close()  # of an earlier run of this process that ended before Kedro could tell
        self._opened.enter_context(opened(**Execution.model_validate(self._execution).model_dump()))

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Kedro calls it when the run has ended well."""
        self._opened.close()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Kedro calls it when a node has failed."""
        self._opened.close()
