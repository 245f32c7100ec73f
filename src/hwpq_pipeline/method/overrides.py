"""Settings for some layers: which layers a pattern means, and what a recipe is for one of them.

A pattern is compressed-tensors' own: a layer's full name, `re:` and a regular expression that its name begins with, or
`Linear` for all. Of several entries that match a layer the last one counts. `ignore` is the entry that comes after all
others: those layers are neither pruned nor rounded.

`regex` reads the expressions as `re` does, and can be stopped: `(a+)+$` would look for its end for hours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import regex

from hwpq_pipeline.errors import HwpqError

EVERY, EXPRESSION = "Linear", "re:"
_SECONDS = 1.0


#: Sections of layers that stay as they are.
NOTHING: dict[str, None] = {"selection": None, "quantization": None}


@dataclass(frozen=True)
class Override:
    """An entry for some layers.

    Attributes:
        match: patterns.
        sections: what it changes, by section; None where nothing is done.
    """

    match: tuple[str, ...]
    sections: Mapping[str, Any]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.match)

    def means(self, layer: str) -> bool:
        """Whether a pattern matches the layer's name; a budget's entries may name thousands of layers."""
        if layer in self._names or EVERY in self._names:
            return True
        return any(matches(pattern, layer) for pattern in self.match if pattern.startswith(EXPRESSION))


def matches(pattern: str, layer: str) -> bool:
    """Whether a pattern matches a layer's name.

    Raises:
        HwpqError: it is an expression that finds no end.
    """
    if pattern.startswith(EXPRESSION):
        try:
            return regex.match(pattern.removeprefix(EXPRESSION), layer, timeout=_SECONDS) is not None
        except TimeoutError as error:
            raise HwpqError(
                f"{pattern!r} takes more than {_SECONDS:.0f} s for the name {layer}",
                where="ignore and layers",
                remedy="Leave repeats inside of repeats out of the expression.",
            ) from error
    return pattern in (layer, EVERY)


def problem_of(pattern: str) -> str | None:
    """What is wrong with a pattern, None if nothing is."""
    if not pattern.startswith(EXPRESSION):
        return None if pattern.strip() else "an empty pattern"
    try:
        regex.compile(pattern.removeprefix(EXPRESSION))
    except (regex.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression ({error})"
    return None


def check_patterns(overrides: Iterable[Override], layers: Sequence[str]) -> None:
    """Refuse a pattern that means no layer.

    Args:
        overrides: the entries.
        layers: names of all compressible layers.

    Raises:
        HwpqError: one matches nothing; the nearest names are told.
    """
    known = frozenset(layers) | {EVERY}
    for override in overrides:
        for pattern in override.match:
            if pattern not in known and not any(matches(pattern, layer) for layer in layers):
                plain = re.sub(r"[\\^$.*+?()\[\]{}|]+", ".", pattern.removeprefix(EXPRESSION)).strip(".")
                ends = {layer.rpartition(".")[2]: layer for layer in layers}
                nearest = get_close_matches(plain, layers, n=3) or [
                    ends[end] for end in get_close_matches(plain.rpartition(".")[2], list(ends), n=3)
                ]
                raise HwpqError(
                    f"{pattern!r} matches no layer",
                    where="ignore and layers",
                    remedy=f"Layers are named like {', '.join(nearest or layers[:3])}.",
                )
