"""Seconds and peak memory of each stage against a model's size, by the commands that a user types.

    make bench-scale
    make bench-scale MODELS=7B ARGS="--blocks 4"

Llama-shaped checkpoints with random weights, in shards of one block, are written on the spot, and `kedro run` takes one
variant (2:4 and INT4, preset `quality`, in sequence) from `fetch` to `evaluate`, each stage in a process of its own.
The peak is the process's largest resident set, with Python and all libraries (some 0.5 GB). Text and tokenizer are the
default model's, so the vocabulary has 49,152 entries. Random weights say nothing of quality. Writes
`results/scale.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.checkpoints.writer import write_weights

ROOT = Path(__file__).resolve().parents[1]
NAME, VOCABULARY, SAMPLES, LENGTH, EVALUATED = "2of4-int4", 49_152, 32, 512, 4
#: Hidden width, feed-forward width, heads, heads of keys and values, blocks.
MODELS = {
    "0.5B": (1024, 4096, 16, 8, 24),
    "1.1B": (2048, 5632, 32, 4, 22),
    "3B": (3072, 8192, 24, 8, 28),
    "7B": (4096, 11008, 32, 32, 32),
}
STAGES = ("fetch", "calibrate", "reference", "recipes", "select", "compress", "export", "evaluate")
VARIANT = {
    "description": "2:4 and INT4, in sequence.",
    "selection": {"structure": "2of4", "metric": "hwpq_weighted"},
    "recovery": {"preset": "quality"},
    "quantization": {"grid": "int4", "group_size": 64},
}


def write_checkpoint(target: Path, model: str, blocks: int, tokenizer: Path) -> None:
    """A random Llama in bfloat16, a shard for each block."""
    from transformers import LlamaConfig

    hidden, wide, heads, pairs, _ = MODELS[model]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=2048, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    target.mkdir(parents=True)
    config.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, target / file)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.embed_tokens.weight", random(VOCABULARY, hidden)
        yield "lm_head.weight", random(VOCABULARY, hidden)
        yield "model.norm.weight", torch.ones(hidden).bfloat16()
        shapes = {"q": (hidden, hidden), "o": (hidden, hidden)} | dict.fromkeys("kv", (hidden // heads * pairs, hidden))
        for block in range(blocks):
            at = f"model.layers.{block}"
            for name, shape in shapes.items():
                yield f"{at}.self_attn.{name}_proj.weight", random(*shape)
            for name, shape in {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}.items():
                yield f"{at}.mlp.{name}_proj.weight", random(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{at}.{name}.weight", torch.ones(hidden).bfloat16()

    write_weights(target, tensors(), shard_bytes=2**28)


def new_project(target: Path, checkpoint: Path, documents: Path) -> None:
    """A project folder with the shipped configuration, for one variant of the checkpoint."""
    shutil.copytree(ROOT / "conf", target / "conf")
    shutil.copy(ROOT / "pyproject.toml", target / "pyproject.toml")
    shutil.copytree(ROOT / "src", target / "src", ignore=shutil.ignore_patterns("__pycache__"))  # Kedro takes no link
    model = {"kind": "directory", "name": "random", "path": str(checkpoint), "license": "none", "dtype": "bfloat16"}
    corpus = {"kind": "local", "name": "text", "path": str(documents), "license": "none", "column": "text"}
    shared = yaml.safe_load((ROOT / "conf" / "base" / "parameters.yml").read_text())
    shared["evaluation"] |= {"samples": EVALUATED, "length": LENGTH}
    shared["calibration"] |= {"samples": SAMPLES, "length": LENGTH}
    local = {"model": model, "corpus": corpus, "evaluation": shared["evaluation"], "calibration": shared["calibration"]}
    gates = {"quality_gates": {"variants": {NAME: {"maximum_perplexity_ratio": 1e9}}}}
    values = {"parameters": local, "parameters_variants": {"variants": {NAME: VARIANT}}, "quality_gates": gates}
    (target / "conf" / "local").mkdir(exist_ok=True)
    for name, value in values.items():
        (target / "conf" / "local" / f"{name}.yml").write_text(yaml.safe_dump(value))


def run_stage(project: Path, stage: str) -> dict[str, Any]:
    """Seconds, peak bytes and new bytes on disk of a stage.

    Raises:
        RuntimeError: it fails.
    """
    own = [] if stage in ("fetch", "calibrate", "reference") else ["--namespaces", f"variants.{NAME}"]
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", stage, *own]
    before, begun = _disk(project / "data"), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process, peak = subprocess.Popen(command, cwd=project, stdout=said, stderr=subprocess.STDOUT), 0
        while process.poll() is None:
            peak = _peak(process.pid) or peak
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{stage}: {said.read()[-2000:]}")
    return {
        "stage": stage,
        "seconds": time.perf_counter() - begun,
        "peak_rss_bytes": peak,
        "disk_bytes": _disk(project / "data") - before,
    }


def _peak(process: int) -> int:
    """Largest resident set of a process so far; 0 if it is gone. `getrusage` would begin with its parent's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(model: str, blocks: int, data: Path, scratch: Path) -> dict[str, Any]:
    """The stages of one model; its files are removed."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        write_checkpoint(root / "checkpoint", model, blocks, data / "01_raw" / "model")
        size = _disk(root / "checkpoint")
        (root / "project").mkdir()
        new_project(root / "project", root / "checkpoint", data / "02_intermediate" / "documents.parquet")
        rows = []
        for stage in STAGES:
            rows.append(run_stage(root / "project", stage))
            print(f"  {model} {blocks} blocks, {stage}: {rows[-1]}", flush=True)
    return {"model": model, "blocks": blocks, "checkpoint_bytes": size, "machine": machine(), "stages": rows}


def table(report: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# Memory and time against a model's size",
        "",
        f"Random Llama-shaped models, vocabulary {VOCABULARY:,}; 2:4 and INT4 in sequence.",
        f"{SAMPLES} × {LENGTH} calibration tokens, {EVALUATED} × {LENGTH} evaluated.",
        "Each stage is a process of its own; its peak holds Python and all libraries. One run a row.",
        "",
        "| model | blocks | checkpoint GB | machine | stage | seconds | peak GB | disk GB |",
        "|---|---:|---:|---|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        about = f"{row['machine']['cores']} × {row['machine']['processor']} ({row['machine']['capability']})"
        lines += [
            f"| {row['model']} | {row['blocks']} | {row['checkpoint_bytes'] / 1e9:.2f} | {about} | {stage['stage']} "
            f"| {stage['seconds']:.0f} | {stage['peak_rss_bytes'] / 1e9:.2f} | {stage['disk_bytes'] / 1e9:.2f} |"
            for stage in row["stages"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.1B"])
    parser.add_argument("--blocks", type=int, help="fewer than the model has; memory is a matter of one")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where a run left model and documents")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are made")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    file = options.out / "scale.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    for model in options.models:
        blocks = options.blocks or MODELS[model][-1]
        row = measure(model, blocks, options.data, options.scratch or Path(tempfile.gettempdir()))
        others = [one for one in report["rows"] if (one["model"], one["blocks"]) != (model, blocks)]
        report["rows"] = [*others, row]
        write_results(options.out, "scale", report, table(report))


if __name__ == "__main__":
    main()
