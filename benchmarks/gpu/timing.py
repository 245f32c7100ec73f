"""Timing with device events, and a row for each measurement.

Before each repeat 256 MiB are overwritten, so that a layer is found in memory and not in the cache that the repeat
before left it in. The host enqueues the work while that runs, which hides its launches; what waits for the host in its
own middle (`.item()`) is timed with that wait. Medians; between 3 and 30 repeats, as a budget of seconds allows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FLUSHED = 256 * 2**20


class Bench:
    """Where measurements are made and rows are written.

    Args:
        out: a file of one JSON object a line, appended to.
        device: that all is measured on.
        dry: tiny shapes, one repeat.
        ceilings: measured before: bytes a second of a copy, operations a second of products, by name.
    """

    def __init__(self, out: Path, device: torch.device, dry: bool, ceilings: dict[str, float]) -> None:
        self.out, self.device, self.dry, self.ceilings = out, device, dry, ceilings
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if self.cuda else None

    def write(self, **row: Any) -> dict[str, Any]:
        """Append a row."""
        row = {"device": str(self.device), **row}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    @contextmanager
    def guarded(self, **labels: Any) -> Iterator[None]:
        """What fails within is a row with its message, and the rest goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - that is the point
            self.write(**labels, error=f"{type(error).__name__}: {error}".strip()[:600])
            if self.cuda:
                torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any], budget: float = 0.5, warm: bool = True) -> list[float]:
        """Times of one call each; the first call (compilation) is not among them unless `warm` is False."""
        if warm:
            work()
        times: list[float] = []
        begun = time.perf_counter()
        least, most = (1, 1) if self.dry else (3 if warm else 1, 30)
        while len(times) < least or (len(times) < most and time.perf_counter() - begun < budget):
            times.append(self._once(work))
        return times

    def _once(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        assert self.flushed is not None  # noqa: S101 - for the type
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.fill_(1)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def measure(
        self,
        work: Callable[[], Any],
        *,
        moved: float | None = None,
        operations: float | None = None,
        ceiling: str | None = None,
        check: Callable[[], str] | None = None,
        extra: Callable[[], dict[str, Any]] | None = None,
        budget: float = 0.5,
        warm: bool = True,
        **labels: Any,
    ) -> float | None:
        """Time, and write a row; a result that is wrong gets no time.

        Args:
            work: what is timed.
            moved: bytes read and written, for GB/s against the copy's.
            operations: floating-point operations, for TFLOP/s against the product named by `ceiling`.
            ceiling: a name in the ceilings; the copy's by default.
            check: says what is wrong with the result, or nothing.
            extra: more for the row, found after the times.
            budget: seconds for repeats.
            warm: call once before, untimed.
            labels: of the row: section, shape, dtype, method.

        Returns:
            The median in seconds; None where it failed.
        """
        median, written = 0.0, False
        with self.guarded(**labels):
            wrong = check() if check else ""
            if wrong:
                raise ValueError(wrong)
            times = self.seconds(work, budget, warm)
            median = statistics.median(times)
            row: dict[str, Any] = {**labels, "seconds": median, "repeats": times, "checked": check is not None}
            if moved is not None:
                row["gigabytes_per_second"] = moved / median / 1e9
                row["fraction_of_ceiling"] = self._share(moved / median, ceiling or "copy")
            if operations is not None:
                row["teraflops"] = operations / median / 1e12
                row["fraction_of_ceiling"] = self._share(operations / median, ceiling or "bfloat16")
            row["clocks"] = clocks() if self.cuda else None
            if extra is not None:
                row |= extra()
            self.write(**row)
            written = True
        return median if written else None

    def _share(self, rate: float, ceiling: str) -> float | None:
        return rate / self.ceilings[ceiling] if ceiling in self.ceilings else None


def clocks() -> str | None:
    """SM and memory clocks in MHz, as the card has them at the moment; read only."""
    return _smi("clocks.sm,clocks.mem")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__}
    for name in ("triton", "numpy", "safetensors"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": card.total_memory / 2**30,
            "l2_mib": getattr(card, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda,
            "driver_and_largest_clocks": _smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit"),
            "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
        }
    return found


def _smi(query: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
