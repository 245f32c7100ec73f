"""Sentences and tables that compare: the README's first paragraph, the paper's claims and ours, the recovery presets.

All numbers come from files that commands wrote. Seconds are compared within one machine: the contest's machine that ran
every preset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.inference_tables import speed
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS
from hwpq_pipeline.figures import making_seconds
from hwpq_pipeline.method.presets import PRESETS, Preset

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 32
Row = Mapping[str, Any]


def metrics(variant: str) -> dict[str, Any]:
    """The figures of a variant that `make run` left."""
    found: dict[str, Any] = json.loads((ROOT / f"data/08_reporting/{variant}/metrics.json").read_text())
    return found


class Contest:
    """The rows of `benchmarks/results/peers.json` at 32 samples, on the machine that ran every preset."""

    def __init__(self) -> None:
        report = json.loads((RESULTS / "peers.json").read_text())
        rows = [row for row in report["rows"] if row["samples"] == SAMPLES]
        self.processor: str = next(row["processor"] for row in rows if row["method"] == "hwpq-fixed_mask")
        self.rows = [row for row in rows if row["processor"] == self.processor]
        self.dense: float = report["dense_perplexity"]
        self.cores: int = report["machine"]["cores"]

    def of(self, task: str, method: str, by: str = "perplexity", side: str | None = None) -> Row:
        """The row of a task and method with the least `by`: perplexity or seconds."""
        rows = [row for row in self.rows if (row["task"], row["method"]) == (task, method) and by in row]
        return min((row for row in rows if side in (None, row["side"])), key=lambda row: float(row[by]))


def headline() -> str:
    """The README's first paragraph: what this is, and what came out."""
    contest, fp8, int4, sparse = Contest(), metrics("fp8"), metrics("int4"), metrics("2of4-fp8")
    healed = metrics("2of4-fp8-healed")
    best, peer, facts = contest.of("2of4", "hwpq-quality"), contest.of("2of4", "sparsegpt"), machine()
    return (
        "HWPQ pipeline makes a Hugging Face causal language model smaller in minutes. It retrains nothing unless a "
        "variant asks for it. "
        f"With {facts['cores']} cores of {processor(facts)}, SmolLM2-135M-Instruct became "
        f"{fp8['compression_ratio']:.2f} × smaller in FP8 at {fp8['perplexity_ratio']:.3f} × its perplexity in "
        f"{making_seconds(fp8):.0f} s, and {int4['compression_ratio']:.2f} × smaller in INT4 at "
        f"{int4['perplexity_ratio']:.3f} × its perplexity in {making_seconds(int4):.0f} s, calibration included. "
        f"Dropping half of the weights (2:4) costs a small model far more: {sparse['perplexity_ratio']:.2f} × in "
        f"{making_seconds(sparse):.0f} s, and {healed['perplexity_ratio']:.2f} × if it then learns from the dense "
        f"model, in {making_seconds(healed):.0f} s in all. Side by side, preset `quality` reaches "
        f"{best['perplexity'] / contest.dense:.2f} × in {best['seconds']:.0f} s where SparseGPT reaches "
        f"{peer['perplexity'] / contest.dense:.2f} × in {peer['seconds']:.0f} s ({contest.cores} cores of "
        f"{contest.processor})."
    )


def presets() -> str:
    """What each preset of recovery does, how long it takes and what comes out; whole seconds of the contest."""
    contest = Contest()
    rows = {
        name: {task: contest.of(task, f"hwpq-{name}") for task in ("2of4", "50")}
        for name in PRESETS
    }  # fmt: skip
    unit = rows["fixed_mask"]["2of4"]["seconds"]
    lines = [
        "| preset | method | time, × `fixed_mask` | perplexity at 2:4 | perplexity at 50 % |",
        "|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        fours, half = rows[name]["2of4"], rows[name]["50"]
        lines.append(
            f"| `{name}` | {_method(preset)} | {fours['seconds'] / unit:.1f} | {fours['perplexity']:.1f} "
            f"| {half['perplexity']:.1f} |"
        )
    lines += [
        "",
        (
            f"Dense: {contest.dense:.1f}. SmolLM2-135M-Instruct, {SAMPLES} × 512 calibration tokens, times at 2:4 with "
            f"calibration ({unit:.0f} s for `fixed_mask`), one run each, {contest.cores} cores of {contest.processor}. "
            "From `benchmarks/results/peers.json` (`make bench-peers`)."
        ),
    ]
    return "\n".join(lines)


def _method(preset: Preset) -> str:
    words = {
        "fixed_mask": f"keeps the selected mask; weights by conjugate gradients, {preset.steps} steps",
        "descent": f"searches the mask by coordinate descent, {preset.rounds} + {preset.sweeps} sweeps",
        "admm": f"searches the mask by ADMM, {preset.rounds} rounds, then descent, {preset.sweeps} sweeps",
    }
    return words[preset.method] + ("; layers in sequence" if preset.sequential else "")


def claims() -> str:
    """Each claim of the paper, and what was measured here."""
    rows = [_quantization_time(), _pruning_time(), _accuracy(), _structure(), _inference()]
    lines = ["| the paper, on LLaMA2 | here, on SmolLM2-135M | measured by |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row.claim} | {row.here} | {row.by} |" for row in rows])


@dataclass(frozen=True)
class _Claim:
    """A row of the table: what the paper says, what came out here, and which command on which machine says so."""

    claim: str
    here: str
    by: str


def _by_contest(contest: Contest, rival: str) -> str:
    where = f"{contest.cores} cores of {contest.processor}, {SAMPLES} × 512 calibration tokens"
    return f"`make bench-peers`, {where}; {rival} by llm-compressor"


def _span(values: Iterable[float], digits: int = 0) -> str:
    """The least and the largest, as `150 to 204`."""
    found = sorted(values)
    return f"{found[0]:.{digits}f} to {found[-1]:.{digits}f}"


def _beside(ours: Row, best: Row, fastest: Row, rival: str) -> str:
    """Seconds and perplexity of ours and of a rival at its best and at its fastest."""
    slow, fast = best["seconds"] / ours["seconds"], fastest["seconds"] / ours["seconds"]
    return (
        f"takes {ours['seconds']:.0f} s: {slow:.1f} × less than {rival} at its best, {fast:.1f} × less than at its "
        f"fastest. Perplexity {ours['perplexity']:.1f}, {best['perplexity']:.1f} and {fastest['perplexity']:.1f}"
    )


def _quantization_time() -> _Claim:
    contest = Contest()
    ours = contest.of("int4", "hwpq")
    best, fastest = contest.of("int4", "gptq"), contest.of("int4", "gptq", by="seconds")
    return _Claim(
        "quantization takes 5.97 × less time than the state of the art on average, 20.75 × at most",
        f"less than that. INT4 {_beside(ours, best, fastest, 'GPTQ')} (dense {contest.dense:.1f})",
        _by_contest(contest, "GPTQ"),
    )


def _pruning_time() -> _Claim:
    contest, report = Contest(), json.loads((RESULTS / "selection.json").read_text())
    ours, quality = contest.of("2of4", "hwpq-fixed_mask"), contest.of("2of4", "hwpq-quality")
    best, fastest = contest.of("2of4", "sparsegpt"), contest.of("2of4", "sparsegpt", by="seconds")
    large = [row for row in report["rows"] if row["dtype"] == "bfloat16" and "4096" in row["shape"]]

    def faster(method: str, rival: str) -> str:
        return _span(row["times_faster_than"][rival] for row in large if row["method"] == method)

    return _Claim(
        "pruning takes 12.29 × less time on average, 56.02 × at most",
        f"true of the mask, not of the whole. On LLaMA-2 7B's shapes the moving average is {faster('ewma', 'sort')} × "
        f"faster than a sort with λ given, {faster('ewma_row', 'sort')} × with λ solved, and 2:4 is "
        f"{faster('two_of_four', 'topk_groups')} × faster than `topk`. A whole 2:4 model with `fixed_mask` "
        f"{_beside(ours, best, fastest, 'SparseGPT')}. `quality` gives {quality['perplexity']:.1f} in "
        f"{quality['seconds']:.0f} s",
        f"{_by_contest(contest, 'SparseGPT')}. Masks: `make bench-selection`, {report['machine']['cores']} cores of "
        f"{processor(report['machine'])}",
    )


def _accuracy() -> _Claim:
    names = ("paper-2of4-fp8", "2of4-fp8", "fp8", "int4")
    literal, sparse, fp8, int4 = (metrics(name)["perplexity_ratio"] for name in names)
    return _Claim(
        "accuracy is largely preserved",
        f"**not by the paper's literal metric at 2:4**: `paper-2of4-fp8` has {literal:.1f} × the dense perplexity. "
        f"`2of4-fp8`, with `hwpq_weighted` and recovery, has {sparse:.1f} ×: far better, and not preserved either. "
        f"Rounding alone preserves it: `fp8` {fp8:.3f} ×, `int4` {int4:.3f} ×",
        "`make run`; machine and tokens as in the [README's table](../README.md#what-comes-out)",
    )


def _structure() -> _Claim:
    return _Claim(
        "2:4 sparsity is supported",
        "yes: the pattern is exact, and every step checks it. Stock engines read it as a dense model with zeros; the "
        "packed form runs in `hwpq_pipeline.runtime` and, with this project's plugin, in vLLM",
        "`make test`; [engines](engines.md)",
    )


def _inference() -> _Claim:
    engines, served, ours = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("inference", "serving", "runtime")
    )
    layers = [row["milliseconds"] for row in engines["layers"]["rows"]]
    decode = {row["name"]: row["decode"]["1"]["median"] for row in served["rows"] if "decode" in row}
    token = {row["way"]: row["further"] for row in ours["rows"] if row["model"] == "default"}

    def stock(variant: str) -> float:
        return speed(engines["models"]["rows"], "llama.cpp", variant, "decode", 1)

    facts = served["machine"]
    return _Claim(
        "inference is 1.50 × faster",
        "on a CPU with AVX2, packed: one sequence of `2of4-int8` decodes "
        f"{decode['2of4-int8, packed'] / decode['dense']:.2f} × as fast as the dense model in bfloat16 in vLLM, and "
        f"{token['dense, bfloat16'] / token['packed, native']:.2f} × in transformers; single layers "
        f"{_span((row['dense bfloat16'] / row['2:4 int8, native'] for row in layers), 1)} ×. "
        "Stock engines gain by fewer bits and not by 2:4: llama.cpp decodes `2of4-int4` at "
        f"{stock('2of4-int4') / stock('int4'):.2f} × the speed of `int4`. On a GPU: not measured yet",
        f"`make bench-serving`, `bench-runtime`, `bench-inference`; {facts['cores']} cores of {processor(facts)}, "
        "llama.cpp on another machine",
    )
