"""An engine maps a function over names and numbers; results come in order, and their bytes do not depend on the engine.

`Local` calls it here. `Dask` (`execution.cluster`) hands each call to a worker: another process of this machine, or of
another one that sees the same files. A call takes no tensors and gives none: the function reads files and writes files
(`checkpoints.parts`), so what travels is small, and what a lost worker had not written is done again.

One engine serves a whole run. `opened` makes it the current one, and the stages ask for `current`: so a stage says what
can be done apart, and not where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from hwpq_pipeline.errors import HwpqError

T = TypeVar("T")
R = TypeVar("R")
ENGINES = ("local", "dask")


class Engine(Protocol):
    """Where work is done."""

    @property
    def workers(self) -> int:
        """How many calls are at work at a time."""

    @property
    def shares_disk(self) -> bool:
        """Whether all of them see the same files."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function(item)` of every item, in order.

        Args:
            function: pickles, and holds names and numbers alone.
            items: names or numbers.
        """

    def close(self) -> None:
        """Let the workers go."""


class Local:
    """One call after the other, in this process."""

    @property
    def workers(self) -> int:
        """One."""
        return 1

    @property
    def shares_disk(self) -> bool:
        """It is one process."""
        return True

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """As `Engine.map`."""
        return map(function, items)

    def close(self) -> None:
        """There is nothing to close."""


_current: Engine = Local()


def current() -> Engine:
    """The engine of the run."""
    return _current


@contextmanager
def opened(
    engine: str, address: str | None = None, workers: int | None = None, files: str | None = None
) -> Iterator[Engine]:
    """Make an engine the current one while the context lasts.

    Args:
        engine: `local` or `dask`.
        address: of a Dask scheduler; None for a cluster of this machine's own, which ends with the context.
        workers: processes of that cluster; one for each core by default.
        files: where files travel by, for workers that do not see this disk.

    Raises:
        HwpqError: an unknown engine.
    """
    global _current  # noqa: PLW0603 (a run has one engine)
    if engine not in ENGINES:
        raise HwpqError(f"no engine {engine!r}", where="execution.engine", remedy=f"Use one of {', '.join(ENGINES)}.")
    if engine == "local":
        yield _current
        return
    from hwpq_pipeline.execution.cluster import Dask  # imports Dask, so only where it is asked for

    before, _current = _current, Dask(address, workers, files)
    try:
        yield _current
    finally:
        _current.close()
        _current = before


@contextmanager
def stepped_aside() -> Iterator[None]:
    """While a call waits for another one: on a cluster's worker, let it do another call meanwhile."""
    if "distributed.worker" not in sys.modules:
        yield
        return
    from distributed import get_worker, rejoin, secede

    try:
        get_worker()
    except ValueError:  # not on a worker
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()
