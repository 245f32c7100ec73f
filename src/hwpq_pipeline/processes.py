"""Working space that tells whose it is, so that what a killed process left is removed by the next one.

`atexit` and `finally` do not run after SIGKILL. So the name of everything that is temporary holds a mark of its
process, and whoever makes the next one looks for those of the dead beside it. A process on another machine may share
the disk, and nothing tells whether it lives: what is its stays.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_MARK = re.compile(r"([A-Za-z0-9_]+)-(\d+)-(\d+)(?=\.)")


def mark() -> str:
    """`<machine>-<process id>-<when it began>`: an id is used again, but not with the same beginning."""
    return _mark_of(psutil.Process())


def new_folder(parent: Path, prefix: str = "") -> Path:
    """A new folder `<prefix><mark>.<random>` of this process; those of dead processes beside it are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in left_overs(parent, prefix):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}{mark()}."))


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a `new_folder`, and remove it at the end."""
    folder = new_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def left_overs(parent: Path, prefix: str = "", suffix: str = "") -> Iterator[Path]:
    """What stands in a folder under the name `<prefix><mark>.<anything><suffix>`, and its process is dead."""
    for path in sorted(parent.glob("*")):
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            found = _MARK.match(path.name, len(prefix))
            if found and found[1] == _machine() and not _lives(int(found[2]), found[0]):
                yield path


def _lives(process: int, its_mark: str) -> bool:
    try:
        there = psutil.Process(process)
        # A zombie has ended, and waits for a parent that does not ask.
        return there.status() != psutil.STATUS_ZOMBIE and _mark_of(there) == its_mark
    except psutil.Error:
        return False


def _mark_of(process: psutil.Process) -> str:
    return f"{_machine()}-{process.pid}-{born(process)}"


def born(process: psutil.Process) -> int:
    """When a process began, in hundredths of a second: since the system's start where it tells, else since 1970.

    psutil's time follows the clock, which may be set while the process runs.
    """
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[19])
    except (OSError, ValueError, IndexError):  # not Linux
        return int(process.create_time() * 100)


@functools.cache
def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", platform.node()) or "machine"
