"""The contest: same checkpoint, same calibration ids, same evaluation ids, one run, one machine, both sides in turn.

    make bench-peers                          everything
    make bench-peers SAMPLES=8 TASKS=2of4     a part: its rows replace their old ones in the result

Every row is a process of its own (peak memory is that of the row), timed from model in memory to compressed model in
memory; ours includes calibration. Both sides compute in bfloat16 where the processor multiplies it, else in float32.
Each peer runs at its defaults and at the settings that make it better or faster, the other dtype among them, and the
best of its rows counts. `benchmarks/results/peers.json` is written after every row. Rows of another machine stay, in
tables of their own: seconds compare within one machine only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.judge import hidden_states, judge
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from benchmarks.peers.jobs import EVALUATION_SAMPLES, LENGTH, SAMPLES, SEED, TASKS, Job, jobs_of
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def make_inputs(model_dir: Path, documents: Path, target: Path, samples: int, seed: int) -> dict[str, float]:
    """Token ids of both sides and the dense model's answer, in one file; the dense model's figures."""
    frame = pd.read_parquet(documents)
    calibration = draw_samples(frame, model_dir, split="calibration", samples=samples, length=LENGTH, seed=SEED)
    evaluation = draw_samples(
        frame, model_dir, split="evaluation", samples=EVALUATION_SAMPLES, length=LENGTH, seed=seed
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.from_numpy(token_matrix(evaluation))
    head = model.lm_head.weight.detach().clone()
    hidden = hidden_states(model, ids)
    save_file(
        {
            "calibration": torch.from_numpy(token_matrix(calibration)),
            "evaluation": ids,
            "dense_hidden": hidden,
            "head": head,
        },
        target,
    )
    return judge(model, ids, hidden, head)


def run(job: Job, model_dir: Path, inputs: Path, python: Path, lock: Path) -> dict[str, Any]:
    """One row, in a process of its own, with the lock held."""
    answer = inputs.with_name("answer.json")
    answer.unlink(missing_ok=True)
    text = json.dumps({**asdict(job), "model": str(model_dir), "inputs": str(inputs), "answer": str(answer)})
    command = (
        [str(python), str(HERE / "peer.py"), text]
        if job.side == "peer"
        else [sys.executable, "-m", "benchmarks.peers.ours", text]
    )
    log = inputs.with_name("log.txt")
    with log.open("w") as sink, lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code = subprocess.run(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
    row = {key: value for key, value in asdict(job).items() if key in ("task", "method", "side", "dtype", "samples")}
    row["settings"] = job.settings
    if code or not answer.exists():
        return row | {"error": f"exit {code}: {log.read_text()[-600:]}"}
    return row | json.loads(answer.read_text())


def check(row: dict[str, Any], layers: dict[str, float]) -> str:
    """Empty if the row compressed what the others did, else what is wrong.

    Args:
        row: with the share of zeros in each linear layer.
        layers: those of a row before it, which must be the same.
    """
    zeros = row.get("zeros", {})
    if row["task"] in ("2of4", "50", "2of4-int4"):
        spread = 0.012 if row["task"] == "50" else 0.0
        low = [name for name, share in zeros.items() if share < 0.5 - spread]
        mean = sum(zeros.values()) / len(zeros)
        if low or (row["task"] == "50" and abs(mean - 0.5) > 0.002):
            return f"{len(low)} layers are not half zeros, {mean:.4f} in the mean"
    if layers and zeros and zeros.keys() != layers.keys():
        return "other layers than the rows before it"
    return f"{row['broken_fours']} fours hold more than two" if row.get("broken_fours") else ""


def key(row: dict[str, Any]) -> str:
    """What a row is found by."""
    names = ("task", "method", "side", "dtype", "samples", "settings", "processor")
    return json.dumps([row[name] for name in names])


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, ordered by task and perplexity."""
    about, dense = report["machine"], report["dense_perplexity"]
    lines = [
        "# Peers: quality and time, side by side",
        "",
        f"{report['model']}, {EVALUATION_SAMPLES} × {LENGTH} evaluation tokens, dense perplexity {dense:.3f}.",
        f"{about['cores']} cores, torch {about['torch']}; peers by {report['peers']}.",
        "Seconds: model in memory to compressed model in memory, ours with calibration. One run a row.",
        "No seconds: other work was running beside it.",
    ]
    for where, samples in sorted({(row["processor"], row["samples"]) for row in report["rows"]}):
        lines += [
            "",
            f"## {samples} × {LENGTH} calibration tokens, {where}",
            "",
            "| task | side | method | settings | perplexity | × dense | KL (nats) | seconds | peak GiB |",
            "|---|---|---|---|---:|---:|---:|---:|---:|",
        ]
        rows = [row for row in report["rows"] if (row["processor"], row["samples"]) == (where, samples)]
        rows.sort(key=lambda row: (TASKS.index(row["task"]), row.get("perplexity", float("inf"))))
        lines += [_line(row, dense) for row in rows]
    return "\n".join(lines) + "\n"


def seconds(row: dict[str, Any]) -> str:
    """A row's time, or a dash where none was kept."""
    return f"{row['seconds']:.0f}" if "seconds" in row else "–"


def _line(row: dict[str, Any], dense: float) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
    settings += f"; {row['note']}" if "note" in row else ""
    head = f"| {row['task']} | {row['side']} | {row['method']} | {row['dtype']}{', ' + settings if settings else ''} |"
    if "error" in row:
        return f"{head} {row['error'].splitlines()[-1][:120]} | | | | |"
    quality = " | | |"
    if "perplexity" in row:
        quality = f" {row['perplexity']:.2f} | {row['perplexity'] / dense:.3f} | {row['kl_divergence']:.4f} |"
    return f"{head}{quality} {seconds(row)} | {row['peak_rss_bytes'] / 2**30:.2f} |"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Ours beside llm-compressor's SparseGPT, Wanda, GPTQ and rounding.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--dtypes", nargs="+", help="only these")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where a run left model and documents")
    parser.add_argument("--peers", type=Path, required=True, help="python of the peers' environment")
    parser.add_argument("--evaluation-seed", type=int, default=SEED, help="of other evaluation tokens, in a file apart")
    parser.add_argument("--untimed", action="store_true", help="other work is running: keep no seconds")
    parser.add_argument("--lock", type=Path, help="file to lock while a row runs; other work may wait for it (flock)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Iterator[Job]:
    """The jobs that the command line asks for."""
    for samples in options.samples:
        for task in options.tasks:
            for job in jobs_of(task, samples):
                if job.method in (options.methods or [job.method]) and job.dtype in (options.dtypes or [job.dtype]):
                    yield job


def versions_of(peers: Path) -> str:
    """What the peers' environment has."""
    versions = "import llmcompressor as l, torch, transformers as t"
    text = "print(f'llmcompressor {l.__version__}, torch {torch.__version__}, transformers {t.__version__}')"
    told = subprocess.run([peers, "-c", f"{versions}; {text}"], capture_output=True, text=True, check=True)
    return told.stdout.strip().splitlines()[-1]


def judged(row: dict[str, Any], job: Job, layers: dict[str, float]) -> dict[str, Any]:
    """The row without its figures if its model is not what the task asks for; see `check`."""
    wrong = row.get("error") or check(row, layers)
    if wrong and job.method == "sparsegpt-gptq" and "error" not in row:
        row["note"] = f"mask not kept: {wrong}"  # its GPTQ writes where SparseGPT has pruned; an easier task
    elif wrong:
        row = {name: row[name] for name in row if name not in ("perplexity", "kl_divergence", "seconds")}
        row["error"] = wrong
    return row


def main() -> None:
    """Run the rows that the command line asks for."""
    options = arguments()
    model_dir, documents = options.data / "01_raw" / "model", options.data / "02_intermediate" / "documents.parquet"
    if not documents.exists():
        raise SystemExit(f"{documents}: not there. Run `kedro run --pipelines fetch` first.")
    peers = versions_of(options.peers)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.safetensors"
        dense = make_inputs(model_dir.resolve(), documents, inputs, max(options.samples), options.evaluation_seed)
        result = "peers" if options.evaluation_seed == SEED else f"peers_seed{options.evaluation_seed}"
        file = options.out / f"{result}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        report = {
            "machine": machine(),
            "model": json.loads((model_dir / "source.json").read_text())["name"],
            "peers": peers,
            "dense_perplexity": dense["perplexity"],
            "rows": old.get("rows", []),
        }
        layers: dict[str, float] = {}
        for job in chosen(options):
            print(f"{job.samples:4} {job.task:10} {job.side:5} {job.method:14} {job.settings} …", flush=True)
            row = run(job, model_dir.resolve(), inputs, options.peers, options.lock or Path(folder) / "lock")
            row["processor"] = processor(report["machine"])
            row = judged(row, job, layers)
            layers = layers or row.get("zeros", {})
            for name in ("zeros", "broken_fours", *(["seconds"] if options.untimed else [])):
                row.pop(name, None)
            row["load_before"] = os.getloadavg()[0]
            told = f"     {row.get('perplexity', 0):.3f}, {row.get('seconds', 0):.1f} s {row.get('error', '')}"
            print(told, flush=True)
            report["rows"] = [other for other in report["rows"] if key(other) != key(row)] + [row]
            write_results(options.out, result, report, table(report))
    print(table(report))
    if any("error" in row for row in report["rows"]):
        raise SystemExit("a row failed: see the table")


if __name__ == "__main__":
    main()
