"""What is planned for each stage beside what it took, over four configurations, by the command that a user types.

    make bench-plan

`kedro run` of each configuration writes the plan first (`data/02_intermediate/plan.json`) and what each stage took last
(`metrics.json`), in one process. Three models are random Llamas of few blocks (`benchmarks.scale`), since memory is a
matter of one block; one is the model of an earlier run. It takes about a quarter of an hour on two cores. Seconds are
planned from samples that are timed when the plan is made: on a machine with other work they tell little. Writes
`results/plan.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import scale
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.measuring import DISK, MEMORY, SECONDS

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = "fetch,plan,calibrate,reference,recipes,select,compress,export,evaluate"
#: What was asked of the plan: a share of what is measured, and a factor for seconds.
WITHIN, FACTOR = 0.25, 1.5
#: Less is not judged: headers of files, and seconds that Python takes.
LEAST_BYTES, LEAST_SECONDS = 1_000_000, 2.0


@dataclass(frozen=True)
class Configuration:
    """A run.

    Attributes:
        model: in `scale.MODELS`; None for the model of an earlier run.
        blocks: of a random model.
        variants: names of shipped variants.
        calibrated, evaluated: samples of 512 tokens.
    """

    model: str | None
    blocks: int
    variants: tuple[str, ...]
    calibrated: int
    evaluated: int


CONFIGURATIONS = {
    "default model": Configuration(None, 0, ("fp8", "ewma50-fp8", "int4"), 8, 4),
    "0.5B-shaped, in sequence": Configuration("0.5B", 3, ("2of4-int4",), 8, 4),
    "0.5B-shaped, more samples": Configuration("0.5B", 2, ("fp8", "2of4-int8"), 24, 8),
    "1.1B-shaped": Configuration("1.1B", 2, ("int4", "fp8"), 4, 2),
}


def run(asked: Configuration, data: Path, scratch: Path) -> list[dict[str, Any]]:
    """A row for each stage: planned and measured.

    Raises:
        RuntimeError: the run fails.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoint, project = Path(folder) / "checkpoint", Path(folder) / "project"
        if asked.model is None:
            checkpoint = data / "01_raw" / "model"
        else:
            scale.write_checkpoint(checkpoint, asked.model, asked.blocks, data / "01_raw" / "model")
        project.mkdir()
        scale.new_project(project, checkpoint.resolve(), (data / "02_intermediate" / "documents.parquet").resolve())
        _configure(project, asked)
        command = [sys.executable, "-m", "kedro", "run", "--pipelines", PIPELINES]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return _rows(project / "data")


def _configure(project: Path, asked: Configuration) -> None:
    shipped = yaml.safe_load((ROOT / "conf" / "base" / "parameters_variants.yml").read_text())["variants"]
    local = project / "conf" / "local"
    shared = yaml.safe_load((local / "parameters.yml").read_text())
    shared["calibration"]["samples"], shared["evaluation"]["samples"] = asked.calibrated, asked.evaluated
    values = {
        "parameters": shared,
        "parameters_variants": {"variants": {name: shipped[name] for name in asked.variants}},
        "quality_gates": {"quality_gates": {"variants": {}}},
    }
    for name, value in values.items():
        (local / f"{name}.yml").write_text(yaml.safe_dump(value))


def _rows(data: Path) -> list[dict[str, Any]]:
    metrics = {file.parent.name: json.loads(file.read_text()) for file in data.glob("08_reporting/*/metrics.json")}
    rows = []
    for need in json.loads((data / "02_intermediate" / "plan.json").read_text()):
        found = metrics[need["variant"]] if need["variant"] else next(iter(metrics.values()))
        if need["stage"] in found[SECONDS]:  # prompts are not measured
            measured = {name: found[name][need["stage"]] for name in (MEMORY, DISK, SECONDS)}
            rows.append({"stage": need["stage"], "variant": need["variant"], "planned": need, "measured": measured})
    return rows


def misses(row: dict[str, Any]) -> list[str]:
    """What of a stage was planned worse than asked."""
    planned, measured = row["planned"], row["measured"]
    found = []
    for name, key in (("memory", MEMORY), ("disk", DISK)):
        far = abs(planned[name] - measured[key])
        if far > WITHIN * measured[key] and max(planned[name], measured[key]) > LEAST_BYTES:
            found.append(name)
    took, said = measured[SECONDS], planned["seconds"]
    if max(took, said) > LEAST_SECONDS and not took / FACTOR <= said <= took * FACTOR:
        found.append("seconds")
    return found


def table(report: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# The plan beside what was measured",
        "",
        f"Asked: memory and disk within {WITHIN:.0%}, seconds within a factor of {FACTOR}.",
        f"Less than {LEAST_BYTES / 1e6:.0f} MB or {LEAST_SECONDS:.0f} s is not judged.",
        "All stages of a configuration run in one process; memory holds Python and all libraries. One run each.",
        "Seconds are planned from samples timed in the run, at the load of that minute.",
        "",
    ]
    for name, found in report["configurations"].items():
        about = found["machine"]
        lines += [
            f"## {name}",
            "",
            f"{about['cores']} cores of {processor(about)}, load {about['load_before']:.1f} before.",
            "",
            "| stage | memory: plan, GB | measured | disk: plan, MB | measured | seconds: plan | measured | missed |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
            *(_line(row) for row in found["rows"]),
            "",
        ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    planned, measured = row["planned"], row["measured"]
    name = row["stage"] + (f" of {row['variant']}" if row["variant"] else "")
    cells = [
        f"{planned['memory'] / 1e9:.2f} | {measured[MEMORY] / 1e9:.2f}",
        f"{planned['disk'] / 1e6:.1f} | {measured[DISK] / 1e6:.1f}",
        f"{planned['seconds']:.0f} | {measured[SECONDS]:.0f}",
        ", ".join(misses(row)),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where a run left model and documents")
    parser.add_argument("--scratch", type=Path, help="where the projects are made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    file = options.out / "plan.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"configurations": {}}
    for name in options.configurations:
        about = machine()
        rows = run(CONFIGURATIONS[name], options.data, options.scratch or Path(tempfile.gettempdir()))
        report["configurations"][name] = {"machine": about, "rows": rows}
        write_results(options.out, "plan", report, table(report))
        print(f"{name}: {sum(map(bool, map(misses, rows)))} of {len(rows)} stages are planned worse than asked")


if __name__ == "__main__":
    main()
