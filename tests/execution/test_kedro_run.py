"""`kedro run` with Dask's workers: all outputs are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import configure, error_lines, kedro, ok

#: What holds seconds, or the name of a run.
TIMED = ("measured.json", "metrics.json", ".crc32")


def outputs(project: Path) -> dict[str, bytes]:
    rooms = ("03_primary", "05_selection", "06_models", "07_export", "08_reporting")
    files = (file for room in rooms for file in (project / "data" / room).rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files if not file.name.endswith(TIMED)}


@pytest.mark.slow
def test_workers_make_what_one_process_makes(small: Path) -> None:
    before = outputs(small)
    for file in before:
        Path(file).unlink()
    configure(small, "parameters", execution={"engine": "dask", "workers": 2})
    done = ok(kedro(small, "--pipelines", "calibrate,reference,select,compress,export,evaluate"))
    assert "2 workers at" in " ".join((done.stdout + done.stderr).split())
    assert outputs(small) == before
    assert list((small / "data" / ".work").iterdir()) in ([], [small / "data" / ".work" / ".locks"])


@pytest.mark.slow
def test_a_wrong_address_is_a_line(small: Path) -> None:
    configure(small, "parameters", execution={"engine": "dask", "address": "tcp://127.0.0.1:9"})
    done = kedro(small, "--pipelines", "select")
    assert done.returncode == 1
    (line,) = error_lines(done)
    assert "tcp://127.0.0.1:9" in line
    assert "dask scheduler" in line
