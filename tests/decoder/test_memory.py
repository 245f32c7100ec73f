"""Memory of freed tensors: kept, as page faults show."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hwpq_pipeline.decoder.memory import keep_freed_memory

MEASURE = """
import resource, sys, torch
from hwpq_pipeline.decoder.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(30)  # until small allocations have found their places
print(faults(20))
"""


RETURN = """
import psutil, torch
from hwpq_pipeline.decoder.memory import keep_freed_memory, return_freed_memory
assert keep_freed_memory()
held = [torch.ones(16 << 20) for _ in range(16)]  # 1 GB
small = torch.ones(100)
del held
print(psutil.Process().memory_info().rss)
assert return_freed_memory()
print(psutil.Process().memory_info().rss)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_what_is_freed_is_used_again() -> None:
    assert faults("keep") < faults("give back") / 10


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_what_was_kept_is_returned() -> None:
    returned = subprocess.run([sys.executable, "-c", RETURN], capture_output=True, text=True, check=True)
    kept, after = map(int, returned.stdout.split())
    assert kept - after > 900 << 20
