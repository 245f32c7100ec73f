"""Seconds of `calibrate` and `compress` against the number of Dask's workers, and whether the bytes stay the same.

    make bench-workers

A random Llama of eight blocks (1024, 4096) goes through real `kedro run`s, once in one process and once with each
number of workers. A scheduler and worker processes with one thread each serve, started as a user starts them. With
`killed` the first worker gets SIGKILL in the middle of the stage, and another one is started. The seconds are those
that the stage notes itself, without the start of Python. Writes `results/workers.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from benchmarks.scale import NAME, ROOT, VARIANT, new_project, write_checkpoint
from hwpq_pipeline.checkpoints.digest import sha256_directory

MODEL, BLOCKS, SAMPLES, LENGTH, BATCH = "0.5B", 8, 16, 512, 2
STAGES = {"calibrate": "03_primary/statistics", "compress": f"06_models/{NAME}/model"}
MEASURED = {"calibrate": "03_primary/calibrate_measured.json", "compress": f"06_models/{NAME}/measured.json"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def started(command: Sequence[str], project: Path) -> subprocess.Popen[bytes]:
    """A process of Dask, with one thread for products."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(project / "src")}
    whole = [sys.executable, "-m", f"distributed.cli.dask_{command[0]}", *command[1:]]
    return subprocess.Popen(whole, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def cluster(project: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address, and its workers' processes."""
    file = project / "scheduler.json"
    file.unlink(missing_ok=True)
    scheduler = started(["scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)], project)
    while not file.is_file():
        time.sleep(0.1)
    address = str(json.loads(file.read_text())["address"])
    processes = [new_worker(address, project) for _ in range(workers)]
    try:
        time.sleep(10)  # they import torch
        yield address, processes
    finally:
        for process in (*processes, scheduler):
            process.kill()
            process.wait()


def new_worker(address: str, project: Path) -> subprocess.Popen[bytes]:
    """One more worker."""
    return started(["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"], project)


def run(project: Path, stage: str, execution: dict[str, Any]) -> dict[str, Any]:
    """One stage, with its output removed before: the seconds that it notes, and its output's digest.

    Raises:
        RuntimeError: it fails.
    """
    output = project / "data" / STAGES[stage]
    shutil.rmtree(output, ignore_errors=True)
    file = project / "conf" / "local" / "parameters.yml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "execution": execution}))
    own = [] if stage == "calibrate" else ["--namespaces", f"variants.{NAME}"]
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", stage, *own]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{stage}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
    noted = json.loads((project / "data" / MEASURED[stage]).read_text())
    return {"seconds": noted[stage]["seconds"], "digest": sha256_directory(output)}


def with_workers(project: Path, stage: str, workers: int, kill_after: float | None = None) -> dict[str, Any]:
    """The stage on a cluster; with `kill_after` a worker is killed then, and another one started."""
    with cluster(project, workers) as (address, processes):

        def kill() -> None:
            processes[0].kill()
            processes.append(new_worker(address, project))

        timer = None if kill_after is None else threading.Timer(kill_after, kill)
        if timer is not None:
            timer.start()
        return run(project, stage, {"engine": "dask", "address": address})


def measure(project: Path, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    for stage in STAGES:
        if stage == "compress":
            run_plain(project, "select")
        alone = run(project, stage, {"engine": "local"})
        rows.append({"stage": stage, "workers": "one process", **alone})
        for number in numbers:
            rows.append({"stage": stage, "workers": number, **with_workers(project, stage, number)})
            print(rows[-1], flush=True)
        killed = with_workers(project, stage, 2, kill_after=25)
        rows.append({"stage": stage, "workers": "2, one killed", **killed})
        print(rows[-1], flush=True)
    return rows


def run_plain(project: Path, stage: str) -> None:
    """A stage of the variant in one process."""
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", stage, "--namespaces", f"variants.{NAME}"]
    subprocess.run(command, cwd=project, capture_output=True, check=True)


def table(report: dict[str, Any]) -> str:
    """The results for people."""
    about = report["machine"]
    lines = [
        "# Seconds against the number of workers",
        "",
        f"A random Llama, {BLOCKS} blocks of (1024, 4096); {SAMPLES} × {LENGTH} calibration tokens, {BATCH} samples a",
        "batch; 2:4 and INT4, not in sequence. One thread a worker, and one where it is one process. One run a row.",
        f"{about['cores']} × {about['processor']} ({about['capability']}).",
        "",
        "| stage | workers | seconds | of one worker | bytes |",
        "|---|---|---:|---:|---|",
    ]
    for row in report["rows"]:
        same = [one for one in report["rows"] if one["stage"] == row["stage"]]
        one = next(other["seconds"] for other in same if other["workers"] == 1)
        bytes_ = "the same" if row["digest"] == same[0]["digest"] else "OTHERS"
        lines.append(
            f"| {row['stage']} | {row['workers']} | {row['seconds']:.1f} | {one / row['seconds']:.2f} × | {bytes_} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where a run left model and documents")
    parser.add_argument("--scratch", type=Path, help="where the project is made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        root = Path(folder)
        write_checkpoint(root / "checkpoint", MODEL, BLOCKS, options.data / "01_raw" / "model")
        project = root / "project"
        project.mkdir()
        new_project(project, root / "checkpoint", options.data / "02_intermediate" / "documents.parquet")
        change(project)
        run_first(project)
        report = {"machine": machine(), "rows": measure(project, options.workers)}
    write_results(options.out, "workers", report, table(report))


def change(project: Path) -> None:
    """The sizes of this benchmark, and the variant not in sequence."""
    local = project / "conf" / "local"
    file = local / "parameters.yml"
    values = yaml.safe_load(file.read_text())
    values["calibration"] |= {"samples": SAMPLES, "length": LENGTH, "batch": BATCH}
    file.write_text(yaml.safe_dump(values))
    variant = {**VARIANT, "recovery": {"preset": "balanced"}}
    (local / "parameters_variants.yml").write_text(yaml.safe_dump({"variants": {NAME: variant}}))


def run_first(project: Path) -> None:
    """What the measured stages read."""
    for stage in ("fetch", "recipes"):
        subprocess.run([sys.executable, "-m", "kedro", "run", "--pipelines", stage], cwd=project, check=True)


if __name__ == "__main__":
    main()
