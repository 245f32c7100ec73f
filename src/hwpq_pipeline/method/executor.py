"""Where groups are worked on.

An executor maps a step over groups and yields the results in the groups' order. `serial` does it here and now. Another
one (`execution`) has each group read and worked on in another process: `Groups` pickles as the names of its files, and
a step writes what it makes, so that no tensor travels. A step's result says no more than what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from hwpq_pipeline.method.groups import Group, Groups

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
