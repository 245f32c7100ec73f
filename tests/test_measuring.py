"""What a stage took: its own peak of memory, also after a larger stage in the same process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hwpq_pipeline.measuring import DISK, GPU, MEMORY, SECONDS, Measuring, tables, together, tree_bytes

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset on Linux alone")
#: A large stage and a small one after it, in a process of their own: the size of pytest's is no business of this test.
STAGES = """
import time
from hwpq_pipeline.measuring import Measuring
for megabytes in (300, 100):
    measuring = Measuring("stage")
    held = b"x" * (megabytes * 10**6)
    time.sleep(0.02)
    del held
    found = measuring.end()["stage"]
    print(found["peak_rss_bytes"], found["seconds"])
"""


@LINUX
def test_a_small_stage_after_a_large_one_has_its_own_peak():
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True, check=True)
    (large, seconds), (small, _) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert 300e6 < large < 400e6
    assert 100e6 < small < 200e6
    assert 0.02 <= seconds < 10


def test_disk_is_what_the_stage_wrote(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(b"12345")
    (folder / "inner" / "b").write_bytes(b"123")
    (tmp_path / "file").write_bytes(b"1")
    found = Measuring("select").end(folder, tmp_path / "file")
    assert found["select"][DISK] == 9
    assert GPU not in found["select"]
    assert tree_bytes(tmp_path / "missing") == 0


def test_metrics_hold_a_table_by_stage_for_each_measurement():
    parts = [{"select": {SECONDS: 1.0, MEMORY: 5}}, {}, {"compress": {SECONDS: 2.0, MEMORY: 6, GPU: 7}}]
    assert tables(parts) == {
        SECONDS: {"select": 1.0, "compress": 2.0},
        MEMORY: {"select": 5, "compress": 6},
        GPU: {"compress": 7},
    }


def test_two_parts_of_a_stage_have_the_larger_peak_and_the_last_files():
    first, second = {SECONDS: 1.0, MEMORY: 5, DISK: 9, GPU: 3}, {SECONDS: 2.0, MEMORY: 4, DISK: 8}
    assert together(first, second) == {SECONDS: 3.0, MEMORY: 5, GPU: 3, DISK: 8}
