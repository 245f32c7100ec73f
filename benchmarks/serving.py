"""Packed 2:4 in vLLM beside vLLM's own: what decoding and a prompt take, on this machine.

    python -m benchmarks.serving
    python -m benchmarks.serving --only dense int4        the others' rows stay as they are

**decode**: tokens a second of one sequence and of eight, after prompts of 32 tokens: what 65 new tokens take beyond
one. **prefill**: a prompt of 512 tokens. Each is taken several times; the median is told, and how far the fastest and
the slowest are apart. vLLM runs in the mode that it takes by default (compiled), with all cores, in one process, in the
model's own bfloat16, and the dense model in float32 too: not every processor multiplies bfloat16. Its own formats are
measured where it has a kernel for this processor. Where it has none, its message is in the table. Quality is the
evaluation's, from `data/08_reporting`.

Every variant is measured in a process of its own, one after the other. Writes `results/serving.{json,md}` and the
picture of quality against the time of a token, `docs/images/serving.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.engines import ask
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.figures import QUALITY, Figure
from hwpq_pipeline.reporting.charts import quality_against

ROOT = Path(__file__).resolve().parents[1]
FILE = RESULTS / "serving.json"
DATA, PICTURE = ROOT / "data", ROOT / "docs" / "images" / "serving.png"
REPEATS, NEW_TOKENS, SHORT, LONG = 5, 65, 32, 512
BATCHES = (1, 8)
#: What is asked, in order: (batch, prompt, new tokens).
RUNS = [[1, LONG, 1], *([batch, SHORT, new] for batch in BATCHES for new in (1, NEW_TOKENS))]
#: By name: the variant, whether the packed export is meant or the one that vLLM reads by itself, the dtype.
CASES = {
    "dense": ("dense", False, "bfloat16"), "dense, float32": ("dense", False, "float32"),
    "int4": ("int4", False, "bfloat16"),
    "2of4-int8, packed": ("2of4-int8", True, "bfloat16"), "2of4-int4, packed": ("2of4-int4", True, "bfloat16"),
    "2of4-fp8, packed": ("2of4-fp8", True, "bfloat16"),
}  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.is_file() else []
    for name in given.only:
        found = {"name": name, **measured(*CASES[name])}
        print(found, flush=True)
        rows = [row for row in rows if row["name"] != name] + [found]
    rows.sort(key=lambda row: list(CASES).index(row["name"]))
    results = {"machine": machine(), "rows": rows}
    write_results(RESULTS, FILE.stem, results, render(results))
    draw(rows, PICTURE)
    print(render(results))


def measured(variant: str, packed: bool, dtype: str) -> dict[str, Any]:
    """A case's row."""
    export = DATA / "07_export" / (f"{variant}.formats/semi-structured" if packed else variant)
    request = {"model": export, "dtype": dtype, "runs": RUNS, "repeats": REPEATS}
    metrics = json.loads((DATA / "08_reporting" / variant / "metrics.json").read_text(encoding="utf-8"))
    row = {"times_dense": metrics["perplexity_ratio"]}
    answer = ask("vllm", request | {"compiled": True}, timeout=3600)
    if "error" in answer:  # the compiler's words say less than the operator's
        answer = ask("vllm", request, timeout=3600)
    if "error" in answer:
        return {**row, "error": answer["error"].splitlines()[0]}
    long, *others = answer["seconds"]
    decode = {
        str(batch): rates(
            [batch * (NEW_TOKENS - 1) / (all_of - first) for first, all_of in zip(short, whole, strict=True)]
        )
        for batch, short, whole in zip(BATCHES, others[::2], others[1::2], strict=True)
    }
    return {**row, "prefill": rates([LONG / seconds for seconds in long]), "decode": decode}


def rates(found: list[float]) -> dict[str, float]:
    """The median of tokens a second, and how far the fastest and the slowest are apart, as a share of it."""
    middle = statistics.median(found)
    return {"median": middle, "spread": (max(found) - min(found)) / middle}


def render(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "Tokens a second in vLLM, and times vLLM's own dense bfloat16; the spread of five runs in brackets.",
        "",
        f"| variant | perplexity, × dense | decode, 1 | decode, 8 | prompt of {LONG} |",
        "|---|---:|---:|---:|---:|",
    ]
    dense = next((row for row in results["rows"] if row["name"] == "dense"), None)
    for row in results["rows"]:
        name = row["name"]
        if "error" in row:
            lines.append(f"| {name} | {row['times_dense']:.3f} | no kernel here: `{row['error']}` | | |")
            continue
        cells = [told(row["decode"][str(batch)], dense and dense["decode"][str(batch)]) for batch in BATCHES]
        lines.append(
            f"| {name} | {row['times_dense']:.3f} | {' | '.join(cells)} | "
            f"{told(row['prefill'], dense and dense['prefill'])} |"
        )
    facts = results["machine"]
    return "\n".join([*lines, "", f"{processor(facts)}, {facts['cores']} cores.", ""])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against what a token of one sequence takes."""
    cost = Figure("milliseconds", "ms a token, one sequence, in vLLM on a CPU", "", better="lower")
    points = [
        {"variant": row["name"], QUALITY.name: row["times_dense"], cost.name: 1000 / row["decode"]["1"]["median"]}
        for row in rows
        if "error" not in row
    ]
    quality_against(pd.DataFrame(points), cost, "Quality against decode speed", path)


def told(rate: dict[str, float], dense: dict[str, float] | None) -> str:
    """A rate, its ratio to the dense one, and its spread."""
    ratio = f", {rate['median'] / dense['median']:.2f} ×" if dense else ""
    return f"{rate['median']:.1f}{ratio} (±{rate['spread'] / 2:.0%})"


if __name__ == "__main__":
    main()
