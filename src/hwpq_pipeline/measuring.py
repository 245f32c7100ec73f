"""What a stage took: seconds, its peak of memory, and the bytes that it left on disk.

All stages may run in one process (`kedro run`), so a process's own peak would be that of the largest stage before.
Linux resets the peak of the resident set (`VmHWM`) where "5" is written to `/proc/self/clear_refs`, and torch resets
its own of a GPU. Before that, memory that earlier stages freed is returned to the system, since it is not this stage's.
What is resident then, Python and its libraries, counts for every stage. Other systems do not reset the peak: there it
is the process's largest so far. A kernel that the stage compiles counts as well.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Tables by stage in `metrics.json`. They differ from run to run, and are no part of a run's content.
SECONDS, MEMORY, GPU, DISK = "seconds", "peak_rss_bytes", "peak_gpu_bytes", "disk_bytes"
COSTS = (SECONDS, MEMORY, GPU, DISK)
#: By stage: what it took, by the names in `COSTS`; `peak_gpu_bytes` is missing where no GPU was used.
Measured = dict[str, dict[str, float]]


class Measuring:
    """The measurement of one stage, which begins with this object.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        _forget_peaks()
        self._begun = time.perf_counter()

    def end(self, *written: Path) -> Measured:
        """What the stage took until now.

        Args:
            written: files and folders that it made.
        """
        found: dict[str, float] = {
            SECONDS: time.perf_counter() - self._begun,
            MEMORY: peak_memory(),
            DISK: sum(map(tree_bytes, written)),
        }
        if (gpu := _gpu()) is not None and (most := gpu.max_memory_allocated()):
            found[GPU] = most
        return {self.stage: found}


def tables(parts: Iterable[Measured]) -> dict[str, dict[str, float]]:
    """The measurements of several stages as `metrics.json` has them: by what was measured, then by stage."""
    found: dict[str, dict[str, float]] = {}
    for part in parts:
        for stage, costs in part.items():
            for name, value in costs.items():
                found.setdefault(name, {})[stage] = value
    return found


def together(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """What two parts of a stage took, of which the second's files take the place of the first's."""
    peaks = {name: max(first.get(name, 0), second.get(name, 0)) for name in {*first, *second} & {MEMORY, GPU}}
    return {SECONDS: first[SECONDS] + second[SECONDS], **peaks, DISK: second[DISK]}


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is neither."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def peak_memory() -> int:
    """The largest resident set of this process, bytes: since the last measurement began, or since ever."""
    if (held := _status("VmHWM")) is not None:
        return held
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # macOS counts bytes


def resident_memory() -> int:
    """The resident set of this process now, without what it has freed; its largest so far where that is not known."""
    _return_freed()
    held = _status("VmRSS")
    return peak_memory() if held is None else held


def _status(entry: str) -> int | None:
    """An entry of Linux's account of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def _forget_peaks() -> None:
    _return_freed()
    if (gpu := _gpu()) is not None:
        gpu.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed: the peak is the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _return_freed() -> None:
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _gpu() -> Any:
    """`torch.cuda` where this process has used a GPU, else None. torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
