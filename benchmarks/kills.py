"""SIGKILL at random moments over all stages: what the next run makes, and how much work was lost.

    make bench-kills
    make bench-kills KILLS=4

A small random model (`benchmarks.kills_project`) goes through every stage once, undisturbed, each a command of its own.
Then, so many times: a stage and a moment within its work are drawn, the same for the same seed; its outputs are
removed; its command is started, and its whole process group is killed at the moment; the same command is run again.
All outputs are compared to the byte with the undisturbed ones, and the working space must be empty. Some commands are
`dvc repro`. Work lost is what both runs computed more than the undisturbed one. The seconds until a run's first node,
which start Python and Kedro, are none of the work. Writes `results/kills.{json,md}`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.kills_project import (
    Job,
    digests,
    jobs,
    left_over,
    new_project,
    remove_outputs,
    work_kept,
)
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results

#: Every so many kills, one goes through `dvc repro`.
DVC_EVERY = 8
_DVC = ("compress@independent", "compress@in-sequence")
#: Kedro says so when a node begins.
_BEGUN = b"Running node"


@dataclass(frozen=True)
class Ran:
    """A run that ended, or was killed.

    Attributes:
        status: exit status; −9 where it was killed.
        seconds: of the whole command.
        start: until the first node began; None if none did.
        said: the end of what it printed.
    """

    status: int
    seconds: float
    start: float | None
    said: str

    @property
    def work(self) -> float:
        """Seconds since the first node began."""
        return 0.0 if self.start is None else self.seconds - self.start


def run(project: Path, command: Sequence[str], kill_at: float | None = None) -> Ran:
    """Run a command in a process group of its own, on one thread; kill the group after `kill_at` seconds of work."""
    (project / "tmp").mkdir(exist_ok=True)
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "KEDRO_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS", "HF_HUB_OFFLINE")
    environment = {**os.environ, **dict.fromkeys(names, "1"), "DO_NOT_TRACK": "true", "MPLBACKEND": "Agg"}
    environment |= {"PYTHONPATH": str(project / "src"), "TMPDIR": str(project / "tmp")}
    begun, start, working = time.perf_counter(), list[float](), threading.Event()
    said: list[bytes] = []
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )

    def listen() -> None:
        for line in process.stdout or ():
            said.append(line)
            if _BEGUN in line and not start:
                start.append(time.perf_counter() - begun)
                working.set()
        working.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        if kill_at is not None:
            working.wait()
        process.wait(kill_at)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.perf_counter() - begun
    listener.join()  # the pipe ends when the last process of the group has
    status = process.returncode
    return Ran(status, seconds, start[0] if start else None, b"".join(said).decode(errors="replace")[-2000:])


def undisturbed(project: Path, every: Sequence[Job]) -> dict[Job, dict[str, Any]]:
    """Seconds, seconds of work and digests of each job; the kernels were compiled before."""
    done: dict[Job, dict[str, Any]] = {}
    for job in every:
        remove_outputs(job, project)
        ran = run(project, job.command)
        if ran.status:
            raise RuntimeError(f"{job.name}: {ran.said}")
        done[job] = {"seconds": ran.seconds, "work": ran.work, "digests": digests(job, project)}
        print(f"  {job.by} {job.name}: {ran.seconds:.1f} s, of them {ran.work:.1f} s work", flush=True)
    return done


def kill(project: Path, job: Job, whole: dict[str, Any], moment: float) -> dict[str, Any]:
    """Kill a job at a share of its seconds, run it again, and compare. A run that ends before is none: earlier, then.

    Raises:
        RuntimeError: the second run fails.
    """
    remove_outputs(job, project)
    while (first := run(project, job.command, kill_at=moment * whole["work"])).status != -signal.SIGKILL:
        moment /= 2
        remove_outputs(job, project)
    kept = work_kept(project)
    second = run(project, job.command)
    if second.status:
        raise RuntimeError(f"{job.name}, after a kill: {second.said}")
    found = digests(job, project)
    lost = max(first.work + second.work - whole["work"], 0.0)
    return {
        "stage": job.stage,
        "variant": job.variant,
        "by": job.by,
        "kept_files": kept,
        "seconds": {
            "undisturbed": round(whole["seconds"], 2),
            "before": round(first.seconds, 2),
            "again": round(second.seconds, 2),
        },
        "work_seconds": {
            "undisturbed": round(whole["work"], 2),
            "before": round(first.work, 2),
            "again": round(second.work, 2),
            "lost": round(lost, 2),
        },
        "lost_parts": round(lost / whole["work"] * job.units, 2),
        "parts": job.units,
        "differing": sorted(
            name for name in {*found, *whole["digests"]} if found.get(name) != whole["digests"].get(name)
        ),
        "files": len(whole["digests"]),
        "left_over": left_over(project),
    }


def chosen(kills: int, seed: int) -> list[tuple[Job, float]]:
    """Jobs and moments: every stage in turn, in a random order, and a few of them through DVC."""
    chance = random.Random(seed)  # noqa: S311 (no secret)
    every = jobs()
    through_dvc = [replace(job, by="dvc") for job in every if job.name in _DVC]
    order: list[Job] = []
    while len(order) < kills:
        order += chance.sample(every, len(every))
    picked = [
        chance.choice(through_dvc) if number % DVC_EVERY == DVC_EVERY // 4 else job
        for number, job in enumerate(order[:kills])
    ]
    return [(job, chance.random()) for job in picked]


def table(report: dict[str, Any]) -> str:
    """The results for people: a row a command, and a paragraph."""
    lines = [
        "| command | kills | same bytes | left-overs | undisturbed work s | most lost s | most lost parts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        name = row["stage"] if row["variant"] is None else f"{row['stage']}@{row['variant']}"
        groups.setdefault(name if row["by"] == "kedro" else f"{name}, dvc", []).append(row)
    for name, rows in sorted(groups.items()):
        cells = (
            name,
            len(rows),
            sum(not row["differing"] for row in rows),
            sum(bool(row["left_over"]) for row in rows),
            f"{rows[0]['work_seconds']['undisturbed']:.1f}",
            f"{max(row['work_seconds']['lost'] for row in rows):.1f}",
            f"{max(row['lost_parts'] for row in rows):.1f} of {rows[0]['parts']}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", summary(report)])


def summary(report: dict[str, Any]) -> str:
    """One paragraph of figures."""
    rows = report["rows"]
    same = sum(not row["differing"] for row in rows)
    dirty = sum(bool(row["left_over"]) for row in rows)
    most = max(row["work_seconds"]["lost"] for row in rows)
    where = report["machine"]
    return (
        f"{len(rows)} kills in the work of a stage, {sum(row['by'] == 'dvc' for row in rows)} through `dvc repro`: "
        f"{same} results equal to the byte, {dirty} with left-overs after the next success. "
        f"Most work lost at a kill: {most:.1f} s. "
        f"Seed {report['seed']}, one thread of {processor(where)}, load {where['load_before']:.1f} before. "
        f"A part is an input group, or a block where one needs those before it; a stage that is not divided is one."
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where the project is made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    picked = chosen(options.kills, options.seed)
    report: dict[str, Any] = {"seed": options.seed, "machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        project = new_project(Path(folder) / "project")
        ready = run(project, [*jobs()[0].command[:3], "run"])
        if ready.status:
            raise RuntimeError(ready.said)
        whole = undisturbed(project, list(dict.fromkeys(job for job, _ in picked)))
        for number, (job, moment) in enumerate(picked, 1):
            row = kill(project, job, whole[job], moment)
            report["rows"].append(row)
            print(f"  {number}/{len(picked)} {job.by} {job.name} at {moment:.2f}: {row}", flush=True)
            write_results(options.out, "kills", report, f"# Killed at random moments\n\n{table(report)}\n")
    if wrong := [row for row in report["rows"] if row["differing"] or row["left_over"]]:
        raise SystemExit(f"{len(wrong)} kills left other bytes, or left-overs: {options.out / 'kills.json'}")


if __name__ == "__main__":
    main()
