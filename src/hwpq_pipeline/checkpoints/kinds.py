"""The kinds of sources that models and texts come from, and the fields that each kind needs.

The parameters check a source before a run, the rooms that fetch check it again when they are called from Python. Both
ask here. This module imports no torch, because the command line reads the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Kinds = Mapping[str, tuple[str, ...]]

MODEL_KINDS: Kinds = {
    "wheel_gguf": ("requirement", "member", "sha256"),
    "gguf": ("path",),
    "directory": ("path",),
    "hub": ("repo",),
}
CORPUS_KINDS: Kinds = {
    "wheel_wikipedia": ("requirement", "member", "sha256"),
    "local": ("path",),
    "hub": ("repo",),
}
#: Fields that only some kinds take; the others may stand beside any kind.
_OF_A_KIND = frozenset({"requirement", "member", "path", "repo"})


def source_problem(source: Any, kinds: Kinds) -> str | None:
    """What is wrong with a source, None if nothing is.

    Args:
        source: has `kind` and the fields named above; a field that is not given is None.
        kinds: `MODEL_KINDS` or `CORPUS_KINDS`.
    """
    if source.kind not in kinds:
        return f"unknown kind {source.kind}; choose one of {', '.join(kinds)}"
    needed = kinds[source.kind]
    if missing := [field for field in needed if not getattr(source, field)]:
        return f"kind {source.kind} needs {', '.join(missing)}"
    if extra := sorted(field for field in _OF_A_KIND - set(needed) if getattr(source, field) is not None):
        return f"kind {source.kind} does not take {', '.join(extra)}"
    return None
