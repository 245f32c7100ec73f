"""Two `kedro run`s at once: on one output the second is refused before it does anything; on others it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import EWMA, error_lines, kedro, ok

HOLD = """
import sys, time
from pathlib import Path
from hwpq_pipeline import locking
from hwpq_pipeline.work.locks import held
work, output = map(Path, sys.argv[1:])
with held(locking._lock_of(output, work), str(output)):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_two_runs_on_one_output(small: Path) -> None:
    work, output = small / "data" / ".work", small / "data" / "06_models" / EWMA / "model"
    before = sorted(file.read_bytes() for file in output.iterdir())
    first = subprocess.Popen([sys.executable, "-c", HOLD, work, output], stdout=subprocess.PIPE, cwd=small)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        second = kedro(small, "--pipelines", "compress")
        assert second.returncode == 1
        (line,) = error_lines(second)
        assert f"process {first.pid}" in line
        assert str(output) in line
        assert sorted(file.read_bytes() for file in output.iterdir()) == before
        ok(kedro(small, "--pipelines", "compress", "--namespaces", "variants.2of4-fp8"))
    finally:
        first.kill()
        first.communicate()
    ok(kedro(small, "--pipelines", "compress"))
    assert list((work / ".locks").iterdir()) == []
    assert [kept for kept in work.iterdir() if kept.name != ".locks"] == []
    assert sorted(file.read_bytes() for file in output.iterdir()) == before
