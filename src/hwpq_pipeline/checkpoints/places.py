"""Names of files that come from a file: they must stay in its folder."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

from hwpq_pipeline.errors import HwpqError

#: Bytes of a file's name that file systems take.
LONGEST = 255


def check_inside(name: str, where: str) -> None:
    """Refuse a file's name that could lead out of the folder: a path, `..`, or nothing.

    Args:
        name: as the file that names it has it.
        where: that file.

    Raises:
        HwpqError: it is no plain name.
    """
    plain = name not in ("", ".", "..") and PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    if not plain or "\0" in name or len(name.encode("utf-8", "replace")) > LONGEST:
        remedy = "Fetch the model again, from a source you trust."
        raise HwpqError(f"{name[:80]!r} is no name of a file beside it", where=where, remedy=remedy)
