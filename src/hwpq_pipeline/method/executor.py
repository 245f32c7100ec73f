"""Where groups are worked on.

An executor maps a step over groups and yields the results in the groups' order. `serial` does it here and now. `apart`
makes one of anything that maps a function over names (`execution.engines`): there each group is read and worked on in
another process, since `Groups` pickles as the names of its files, and a step writes what it makes, so that no tensor
travels. A step's result says no more than what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from hwpq_pipeline.execution.engines import Local, current
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.groups import Groups

R = TypeVar("R")


class Executor(Protocol):
    """Maps a step over groups, results in the groups' order."""

    def __call__(self, step: Callable[[Group], R], groups: Groups) -> Iterator[R]:
        """`step(group)` of every group."""


def serial(step: Callable[[Group], R], groups: Groups) -> Iterator[R]:
    """One group after the other, in this process."""
    with torch.inference_mode():
        for group in groups:
            yield step(group)


def apart(mapped: Callable[[Callable[[str], Any], Iterable[str]], Iterator[Any]]) -> Executor:
    """An executor that has groups worked on elsewhere, by their names.

    Args:
        mapped: maps a function over names, results in order.
    """

    def executor(step: Callable[[Group], R], groups: Groups) -> Iterator[R]:
        return mapped(partial(_one, step, groups.limited(groups.recipe, None)), groups.members())

    return executor


def of_run() -> Executor:
    """The executor of the run's engine; without one the groups are worked on here, and read ahead."""
    engine = current()
    return serial if isinstance(engine, Local) else apart(engine.map)


def _one(step: Callable[[Group], R], groups: Groups, name: str) -> R:
    (result,) = serial(step, groups.only_those([name]))
    return result
