"""Find the line of a parameter in the YAML, so that an error can point at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

PATTERNS = ("parameters*.yml", "quality_gates*.yml")


def find_line(path: Sequence[str], folders: Sequence[Path]) -> str | None:
    """The line of a parameter, or of the nearest entry above it: `conf/base/parameters_variants.yml:12`.

    Args:
        path: keys from the outermost, `("variants", "fp8", "quantization", "grid")`.
        folders: configuration folders; the one that wins comes first. The first folder that has the outermost key
            counts, as in Kedro's merge.

    Returns:
        File and line, counted from 1; None if no file has the outermost key or a file is not YAML.
    """
    for folder in folders:
        for file in sorted(file for pattern in PATTERNS for file in folder.glob(pattern)):
            try:
                root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except yaml.YAMLError:
                return None
            if (line := _line(root, path)) is not None:
                return f"{file}:{line}"
    return None


def _line(node: yaml.Node | None, path: Sequence[str]) -> int | None:
    """The line of the last key of `path` that exists; None if the first does not."""
    line = None
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            break
        found = next(((name, value) for name, value in node.value if name.value == key), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line
