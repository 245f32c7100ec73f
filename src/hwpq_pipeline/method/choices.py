"""The words for what may be done to a layer: `dense`, `int8`, `int4-64`, `2of4`, `2of4-fp8_e4m3`, `2of4-int4-64`.

A word is a structure (`2of4-`), a grid, and the columns that share a scale. Grids that coordinate descent can walk on
are rounded by it. This module imports no torch, because the parameters read it.
"""

from __future__ import annotations

from typing import Any

from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError

DENSE, TWO_OF_FOUR = "dense", "2of4"


def sections_of(word: str) -> dict[str, dict[str, Any] | None]:
    """The `selection` and `quantization` that a word stands for, as a variant writes them.

    Raises:
        HwpqError: it is no such word.
    """
    pruned = word == TWO_OF_FOUR or word.startswith(f"{TWO_OF_FOUR}-")
    rest = word.removeprefix(TWO_OF_FOUR).removeprefix("-") if pruned else word
    selection = {"structure": TWO_OF_FOUR} if pruned else None
    if word == TWO_OF_FOUR or (rest == DENSE and not pruned):
        return {"selection": selection, "quantization": None}
    name, hyphen, size = rest.partition("-")
    grid = None if hyphen and not size else GRIDS.get(name)
    sizes = [str(one) for one in grid.group_sizes] if grid else []
    if grid is None or (size not in sizes if sizes else size):
        every = [one.name + _told(one.group_sizes) for one in GRIDS.values()]
        raise HwpqError(
            f"{word!r} is no choice",
            where="budget",
            remedy=f"Take {DENSE}, {TWO_OF_FOUR}, {', '.join(every)}, or {TWO_OF_FOUR}- before one of these.",
        )
    method = "coordinate_descent" if grid.descends else "nearest"
    group_size = int(size) if size else None
    return {"selection": selection, "quantization": {"grid": name, "group_size": group_size, "method": method}}


def _told(sizes: tuple[int, ...]) -> str:
    return f"-({'|'.join(map(str, sizes))})" if sizes else ""
