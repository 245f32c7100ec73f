"""How the columns are cut, which all versions share."""

from __future__ import annotations

BLOCK = 64
WIDEST_REFIT = 256


def block_columns(columns: int, size: int) -> int:
    """Columns a block: whole groups where a group is no wider than `WIDEST_REFIT`, about `BLOCK` otherwise."""
    if size > WIDEST_REFIT:
        return next(width for width in range(min(BLOCK, size), 0, -1) if size % width == 0)
    groups = max(BLOCK // size, 1)
    while (columns // size) % groups:
        groups -= 1
    return size * groups
