"""The node that ends a stage: what a killed run would have gone on from is removed, once the results are in place.

The node takes the results as inputs for the order alone: Kedro runs it when they are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from kedro.pipeline import Node, node

from hwpq_pipeline.work.folder import forget_work


def forgetting(stage: str, results: list[str]) -> Node:
    """The node for a stage of all variants.

    Args:
        stage: as in `work.folder.open_work`.
        results: of the stage, by dataset.
    """
    return node(_named(_forget, stage), ["work", *results], None, name=f"forget_{stage}")


def forgetting_of_variant(stage: str, results: list[str], *others: str) -> Node:
    """The node for a variant's stage; see `forgetting`.

    Args:
        stage: without the variant's name.
        results: as there.
        others: further stages whose work goes with it.
    """
    forget = _named(_forget_of_variant, (stage, *others))
    return node(forget, ["work", "name", *results], None, name=f"forget_{stage}")


def _named(function: Callable[..., None], first: Any) -> Callable[..., None]:
    """The function with its first argument given; Kedro warns of one without a name and type hints."""
    return update_wrapper(partial(function, first), function)


def _forget(stage: str, work: Path, *_: Any) -> None:
    forget_work(work, stage)


def _forget_of_variant(stages: tuple[str, ...], work: Path, name: str, *_: Any) -> None:
    for stage in stages:
        forget_work(work, f"{stage}.{name}")
