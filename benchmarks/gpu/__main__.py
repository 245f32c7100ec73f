"""The command: sections one after the other, each in a process of its own, then the table."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: Seconds that a section may take; together under ten minutes.
SECTIONS = {"ceilings": 40, "select": 100, "recover": 140, "model": 130, "linears": 110, "tiles": 55}
TOTAL = 575
#: Module and function of each; imported when its turn comes, so that what one lacks stops no other.
WORK = {
    "ceilings": ("ceilings", "run"),
    "select": ("selecting", "run"),
    "recover": ("recovering", "run"),
    "model": ("inference", "run_model"),
    "linears": ("inference", "run_linears"),
    "tiles": ("selecting", "run_tiles"),
}


def main() -> None:
    """Measure, write `gpu.json` and `gpu.md` after every section, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, under Triton's interpreter")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    if options.rows:
        work(options.sections, options.rows, options.dry_run)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        begun = time.monotonic()
        if options.dry_run:
            work(options.sections, rows, dry=True)
        else:
            for section in options.sections:
                left = TOTAL - (time.monotonic() - begun)
                run_section(section, rows, min(SECTIONS[section], left), options.out)
        report = collect(rows)
        report["seconds"] = time.monotonic() - begun
        write(options.out, report)
    sys.stdout.write(table(report))


def run_section(section: str, rows: Path, limit: float, out: Path) -> None:
    """One section in a process of its own; what it did not come to is a row."""
    sys.stderr.write(f"{section} …\n")
    command = [sys.executable, "-m", "benchmarks.gpu", "--sections", section, "--rows", str(rows)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    failure = ""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(limit, 1), check=False)
        failure = f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"not done after {limit:.0f} s"
    if failure:
        with rows.open("a") as file:
            file.write(json.dumps({"section": section, "method": "section", "error": failure}) + "\n")
    write(out, collect(rows))


def work(sections: list[str], rows: Path, dry: bool) -> None:
    """Do sections in this process."""
    import torch

    from benchmarks.gpu.timing import Bench, facts

    if not dry and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run shows on the CPU that all of it runs")
    device = torch.device("cpu" if dry else "cuda:0")
    known = {row["ceiling"]: row["rate"] for row in collect(rows)["rows"] if "ceiling" in row}
    bench = Bench(rows, device, dry, known)
    with bench.guarded(section="facts", method="facts"):
        bench.write(section="facts", method="facts", facts=facts(device))
    for section in sections:
        with torch.no_grad(), bench.guarded(section=section, method="section"):
            module, function = WORK[section]
            getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(bench)


def collect(rows: Path) -> dict[str, Any]:
    """The report so far: the machine, and the rows."""
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    report: dict[str, Any] = {"machine": {}, "rows": []}
    for row in found:
        if "facts" in row:
            report["machine"] |= row["facts"]
        else:
            report["rows"].append(row)
    return report


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files, each whole."""
    from benchmarks.output import write_results

    write_results(out, "gpu", report, table(report))


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = report["machine"]
    lines = [
        "# On a GPU",
        "",
        "; ".join(f"{key}: {value}" for key, value in about.items() if value is not None),
        "",
        "| section | shape | method | tokens | ms | GB/s | TFLOP/s | of the ceiling | error | |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        number = {
            "ms": 1e3 * row["seconds"] if "seconds" in row else None,
            "bytes": row.get("gigabytes_per_second"),
            "operations": row.get("teraflops"),
        }
        cells = [
            row.get("section", ""),
            f"{row.get('model', '')} {row.get('shape', '')}".strip(),
            row.get("method", ""),
            str(row.get("tokens", row.get("batch", ""))),
            *("" if value is None else f"{value:.4g}" for value in number.values()),
            "" if row.get("fraction_of_ceiling") is None else f"{row['fraction_of_ceiling']:.1%}",
            row["error"] if isinstance(row.get("error"), str) else "" if "error" not in row else f"{row['error']:.4g}",
            " ".join(str(row[key]) for key in ("phase", "how", "tile") if key in row),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
