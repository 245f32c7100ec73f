"""What models of 7, 70 and 405 billion weights would take on this machine: bytes, operations, seconds.

    make cost-model

A table of the plan (`hwpq plan`) for configurations of Llama's shapes, without weights. Its rates are timed on this
machine, on small samples of the real steps. **Assumptions.** The shapes are Llama's. The samples are the shipped ones.
All of one stage is done by one process, at the rates that it has now. On a cluster, divide the seconds of `calibrate`,
`compress` (not in sequence) and `evaluate` by the number of workers that are like this machine; `results/workers.md`
says what two workers reach. Disks read as fast as checksums are compared. Nothing waits for a network.
`results/plan.md` says how far plans were from measurements on models that fit here. Writes
`results/cost_model.{json,md}`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.planning import Conditions, Tokens, plan_stages
from hwpq_pipeline.planning.rates import measure_rates
from hwpq_pipeline.planning.shapes import read_shapes
from hwpq_pipeline.variant import Variant

ROOT = Path(__file__).resolve().parents[1]
#: Hidden width, feed-forward width, blocks, heads, heads of keys and values, entries of the vocabulary.
SHAPES = {
    "7B": (4096, 11008, 32, 32, 32, 32_000),
    "70B": (8192, 28672, 80, 64, 8, 128_256),
    "405B": (16384, 53248, 126, 128, 8, 128_256),
}
VARIANTS = ("int4", "2of4-int4")
#: Memory of Python and its libraries; each row says the rest.
FLOOR = 600_000_000


def write_config(folder: Path, model: str) -> None:
    """A Llama's config, without weights."""
    from transformers import LlamaConfig

    hidden, wide, blocks, heads, pairs, vocabulary = SHAPES[model]
    LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=pairs, vocab_size=vocabulary, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def recipes(*, sequential: bool) -> dict[str, Recipe]:
    """The shipped variants; independent ones are those with their sequence left out."""
    entries = yaml.safe_load((ROOT / "conf/base/parameters_variants.yml").read_text())["variants"]
    found = {name: Recipe.from_variant(Variant.model_validate(entries[name]).model_dump()) for name in VARIANTS}
    return found if sequential else {name: replace(one, sequence=None) for name, one in found.items()}


def rows_of(model: str) -> list[dict[str, Any]]:
    """The stages of one model."""
    shared = yaml.safe_load((ROOT / "conf/base/parameters.yml").read_text())
    calibration, evaluation = (
        Tokens(shared[part]["samples"], shared[part]["length"], shared[part]["batch"])
        for part in ("calibration", "evaluation")
    )
    conditions = Conditions(calibration, evaluation)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), model)
        shapes = read_shapes(folder)
        both = {"in sequence": recipes(sequential=True), "independent": recipes(sequential=False)}
        every = [recipe for some in both.values() for recipe in some.values()]
        rates = measure_rates(folder, shapes, every, item=4, device=torch.device("cpu"))
    forward = 2.0 * calibration.count * shapes.weights
    sums = 1.5 * calibration.count * shapes.inputs
    found: list[dict[str, Any]] = [
        {"model": model, "way": "", "forward": forward, "sums": sums, "parameters": shapes.parameters}
    ]
    for way, some in both.items():
        needs = plan_stages(shapes, some, conditions, floor=FLOOR, rates=rates)
        found += (
            {"model": model, "way": way if need.variant else "", **asdict(need)}
            for need in needs
            if need.variant is not None or way == "in sequence"
        )
    return found


def table(report: dict[str, Any]) -> str:
    """The results for people."""
    about = report["machine"]
    lines = [
        "# What large models would take on this machine",
        "",
        f"Planned, not run: {about['cores']} × {about['processor']} ({about['capability']}), float32, one process.",
        "32 × 512 calibration tokens, 16 × 512 evaluated. `python -m benchmarks.cost_model` says what is assumed.",
        "",
    ]
    for head in (row for row in report["rows"] if "forward" in row):
        lines += [
            f"## {head['model']}: {head['parameters'] / 1e9:.1f} billion parameters",
            "",
            f"A forward pass of the calibration tokens is {head['forward']:.2g} operations, its sums are",
            f"{head['sums']:.2g}.",
            "",
            "| stage | variant | | peak GB | disk GB | temporary GB | read GB | hours |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in report["rows"]:
            if row["model"] == head["model"] and "stage" in row and row["stage"] != "select":
                sizes = " | ".join(f"{row[name] / 1e9:.1f}" for name in ("memory", "disk", "working", "read"))
                name = f"{row['stage']} | {row['variant'] or ''} | {row['way']}"
                lines.append(f"| {name} | {sizes} | {row['seconds'] / 3600:.1f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for model in SHAPES for row in rows_of(model)]
    report = {"machine": machine(), "rows": rows}
    write_results(options.out, "cost_model", report, table(report))


if __name__ == "__main__":
    main()
