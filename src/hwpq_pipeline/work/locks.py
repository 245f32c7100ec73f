"""One writer at a time: a second run on an output that is being made is refused, and told of the first.

The system holds the lock (`flock`), so that it is free when its process is gone, however it ended. The lock's file says
who holds it and since when; it is removed with the lock.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hwpq_pipeline.errors import HwpqError


@contextmanager
def held(lock: Path, output: str) -> Iterator[None]:
    """Hold the right to write an output while the context lasts.

    Args:
        lock: the lock's file.
        output: what is written, for errors.

    Raises:
        HwpqError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    taken = FileLock(lock, timeout=0, thread_local=False)
    try:
        taken.acquire()
    except Timeout as error:
        raise HwpqError(
            f"{_holder(lock)} is writing it", where=output, remedy="Wait until that run has ended, or end it."
        ) from error
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        lock.write_text(json.dumps({"process": os.getpid(), "machine": platform.node(), "since": now}))
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is free: who waits for it sees that the file is another one
        taken.release()


def _holder(lock: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(lock.read_text())
        return f"process {found['process']} on {found['machine']} (since {found['since']})"
    return "another process"
