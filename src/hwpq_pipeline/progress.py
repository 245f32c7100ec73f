"""Progress of long steps: bars on the console that Kedro's log uses, so that neither breaks the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import rich
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

T = TypeVar("T")
#: Is told of a step's progress: `(done, total)`.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Take a report of progress and show nothing."""


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Show a bar while the body runs.

    Args:
        description: what is being done.

    Yields:
        A function `(done, total)` that moves the bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with rich.progress.Progress(
        *columns, console=rich.get_console(), transient=not rich.get_console().is_terminal
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def with_progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate over `items` with a bar of `total` steps."""
    with progress_bar(description) as move:
        move(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            move(done, total)
