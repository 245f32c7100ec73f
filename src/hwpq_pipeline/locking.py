"""A Kedro hook: a run holds all its outputs, so that no two runs write one of them.

A run is refused before its first node if another one is making anything that it would make. Runs of different variants
share no output, and go on beside each other.
"""

from __future__ import annotations

import atexit
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from hwpq_pipeline.datasets import CacheDataset
from hwpq_pipeline.work.locks import held


class LockHooks:
    """Holds the outputs of the run."""

    def __init__(self) -> None:
        self._held = ExitStack()
        atexit.register(self._held.close)  # where a run ends before Kedro can tell

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol[Any, Any]) -> None:
        """Kedro calls it when it knows what runs.

        Raises:
            HwpqError: another run is making one of the outputs.
        """
        self._held.close()  # of an earlier run of this process that ended before Kedro could tell
        work = catalog.get("work")
        if not isinstance(work, CacheDataset):  # a catalog of parts of the project
            return
        outputs = (getattr(catalog.get(name), "path", None) for name in sorted(pipeline.all_outputs()))
        working = [work.path / node.name for node in pipeline.nodes if "work" in node.inputs]  # it has a folder there
        with ExitStack() as taken:
            for place in sorted({Path(place) for place in (*outputs, *working) if place is not None}):
                taken.enter_context(held(_lock_of(place, work.path), str(place)))
            self._held.callback(taken.pop_all().close)

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Kedro calls it when the run has ended well."""
        self._held.close()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Kedro calls it when a node has failed."""
        self._held.close()


def _lock_of(output: Path, work: Path) -> Path:
    digest = hashlib.sha256(str(output).encode()).hexdigest()[:12]  # of the whole, which may be too long for a name
    return work / ".locks" / f"{'+'.join(output.parts[-3:])}.{digest}"
