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


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_what_is_freed_is_used_again() -> None:
    assert faults("keep") < faults("give back") / 10
