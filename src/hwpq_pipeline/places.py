"""Where in the YAML a parameter stands, so that an error can point at the line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

PATTERNS = ("parameters*.yml", "quality_gates*.yml")


def find_line(path: Sequence[str], folders: Sequence[Path]) -> str | None:
    """`conf/base/parameters_variants.yml:12`, where the parameter or the nearest entry above it stands.

    Args:
        path: keys from the outermost, `("variants", "fp8", "quantization", "grid")`.
        folders: of configuration, the one that wins first: as Kedro merges them, the first that has the outermost key
            is the one that counts.

    Returns:
        File and line, counted from 1; None where no file has the outermost key or a file is no YAML.
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
    """Line of the last key of `path` that is there; None if the first is not."""
    line = None
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            break
        found = next(((name, value) for name, value in node.value if name.value == key), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line
