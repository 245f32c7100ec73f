"""What memory management costs when a model is healed: seconds a step, with the C library's memory in three ways.

    python -m benchmarks.healing_memory

A step frees tensors of up to some hundred megabytes. `glibc` gives their pages back to the system at once, `kept` keeps
them (`decoder.memory`, which the project does), and `jemalloc` is another C library's allocator, if it is installed
(LD_PRELOAD). Each way is a process of its own, in turn, twice. Writes `benchmarks/results/healing_memory.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from ctypes.util import find_library
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.decoder import loading
from hwpq_pipeline.method.healing import heal
from hwpq_pipeline.method.healing_state import State, key_of
from hwpq_pipeline.method.presets import HEALING
from hwpq_pipeline.method.student import Student

ROOT = Path(__file__).parents[1]
VARIANT = "2of4-fp8"
STEPS, HELD_OUT, TURNS = 6, 1, 2
WAYS = ("glibc", "kept", "jemalloc")


def one(data: Path, way: str) -> dict[str, float]:
    """Seconds a step (median without the first), the share of them in the kernel of the system, and peak memory."""
    if way != "kept":
        vars(loading)["keep_freed_memory"] = lambda: False
    model_dir = data / "01_raw" / "model"
    samples = token_matrix(pd.read_parquet(data / "02_intermediate" / "calibration.parquet"))[: STEPS + HELD_OUT]
    ids, ends = torch.from_numpy(samples), [time.perf_counter()]
    healing = replace(HEALING, tokens=STEPS * ids.shape[1], held_out=HELD_OUT)
    student = Student(model_dir, CompressedModel(data / "06_models" / VARIANT / "model"), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder), VARIANT, key_of(model_dir, student, ids, healing))
        before = resource.getrusage(resource.RUSAGE_SELF)
        heal(model_dir, student, ids, healing, state=state, report=lambda *_: ends.append(time.perf_counter()))
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    steps = [end - start for start, end in pairwise(ends[1:])]
    return {
        "seconds_a_step": statistics.median(steps),
        "system_share": system / (system + user),
        "peak_bytes": after.ru_maxrss * 1024.0,
    }


def apart(data: Path, way: str) -> dict[str, Any] | None:
    """`one` in a process of its own; None where the allocator is not installed."""
    environment = dict(os.environ)
    if way == "jemalloc":
        library = find_library("jemalloc")
        if library is None:
            return None
        environment["LD_PRELOAD"] = library
    command = [sys.executable, "-m", "benchmarks.healing_memory", "--data", str(data), "--way", way]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return {"way": way, **json.loads(done.stdout.strip().splitlines()[-1])}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| memory | seconds a step | of them in the system | peak, GiB |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['way']} | {row['seconds_a_step']:.2f} | {row['system_share']:.0%} | {row['peak_bytes'] / 2**30:.1f} |"
        for row in report["rows"]
    ]
    return "\n".join([*lines, "", f"Steps of 512 tokens. {processor(report['machine'])}.", ""])


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--way", choices=WAYS, help="one way, in this process")
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(one(options.data, options.way)))
        return
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    for _ in range(TURNS):
        report["rows"] += [row for way in WAYS if (row := apart(options.data, way)) is not None]
    write_results(RESULTS, "healing_memory", report, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
