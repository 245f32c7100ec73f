"""A Kedro hook: a variant that cannot be made becomes a failed run in MLflow, beside those that could."""

from __future__ import annotations

import logging
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.pipeline.node import Node

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.tracking.connection import resolve_uri
from hwpq_pipeline.tracking.failures import log_failure

logger = logging.getLogger(__name__)


class FailureHooks:
    """Logs the variants that fail."""

    def __init__(self) -> None:
        self._track: dict[str, Any] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Kedro calls it when the context exists: it says where runs are logged."""
        self._track = context.config_loader["parameters"].get("track")

    @hook_impl
    def on_node_error(self, error: Exception, node: Node) -> None:
        """Kedro calls it when a node fails. A node outside of a variant's namespace is no variant's failure."""
        _, _, variant = (node.namespace or "").partition("variants.")
        stage = node.name.rpartition(".")[2]
        track = self._track
        if not variant or not track or stage == "log":  # a failure in `log` has a run already
            return
        try:
            log_failure(
                variant, stage, error, experiment=track["experiment"], tracking_uri=resolve_uri(track["tracking_uri"])
            )
        except HwpqError as problem:
            logger.warning("The failure was not logged: %s", problem)
