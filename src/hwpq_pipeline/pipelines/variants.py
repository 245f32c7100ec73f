"""A pipeline for every variant: the same nodes, in the namespace `variants.<name>`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kedro.pipeline import Node, Pipeline

#: Datasets that all variants read, hence without a namespace.
SHARED = {
    "model", "corpus", "sources", "documents", "calibration", "evaluation", "statistics", "reference", "scratch",
    "fetch_measured", "calibrate_measured", "reference_measured", "work",
}  # fmt: skip


def for_each_variant(nodes: Iterable[Node], names: Iterable[str]) -> Pipeline:
    """One copy of `nodes` for each variant.

    Datasets get the namespace `variants.<name>`, except those in `SHARED`. `params:variant` becomes the variant's
    entry, `params:variant.<key>` a part of it. All variants share the other parameters.

    Args:
        nodes: written for one variant.
        names: of the variants.
    """
    template = Pipeline(list(nodes))
    shared = {name for name in template.inputs() if name in SHARED}
    parameters = {name for name in template.inputs() if name.startswith("params:")}
    return sum(
        (
            Pipeline(
                template,
                namespace=f"variants.{name}",
                inputs=shared,
                parameters={
                    parameter: re.sub(r"^params:variant(?=\.|$)", f"params:variants.{name}", parameter)
                    for parameter in parameters
                },
            )
            for name in names
        ),
        Pipeline([]),
    )


def keyed(names: Iterable[str], dataset: str) -> dict[str, str]:
    """Inputs of a node over all variants: a dataset of each. A prefix tells them from the node's other arguments."""
    return {f"{dataset}:{name}": f"variants.{name}.{dataset}" for name in names}


def by_variant(inputs: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """What such a node was given of that dataset, by variant."""
    prefix = f"{dataset}:"
    return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}
