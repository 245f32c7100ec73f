"""A model's `config.json`, held to limits before a model is built from it.

Even without weights a model of a thousand million layers is a thousand million objects. So numbers that say how many
parts are built, or how large one is, have bounds far beyond any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.errors import HwpqError

MOST_PARTS, MOST_SIZE = 10_000, 2**31
#: Keys that count modules, and keys that say how large something is.
_PARTS = re.compile(r"(layers|n_layer|num_blocks|experts|heads|n_head|codebooks)$")
_SIZES = re.compile(
    r"(size|dim|rank|features|channels|positions|embd|d_model|inner|state|layers|n_layer|heads|n_head)$"
)


def check_config(path: str | Path) -> None:
    """Read a checkpoint's config and hold its numbers to the limits.

    Raises:
        HwpqError: it is missing, is no JSON object, or a number is out of bounds.
    """
    file = Path(path) / "config.json"
    for key, value in _numbers(read_json(file), 0):
        most = MOST_PARTS if _PARTS.search(key) else MOST_SIZE
        if abs(value) > most or (value < 0 and _SIZES.search(key)):
            raise HwpqError(
                f"{key} is {value}", where=str(file), remedy="Fetch the model again, or use another: no model has that."
            )


def _numbers(value: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Every whole number below, with the key that it stands under."""
    if depth > 20:
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(part, int) and not isinstance(part, bool):
                yield str(key), part
            else:
                yield from _numbers(part, depth + 1)
