"""What selecting without a sort costs in quality: perplexity after EWMA and after an exact sort of every row.

    make bench-selection-quality

On the default model, with the statistics and tokens that `kedro run --pipelines calibrate,reference` left in `data/`:
30, 50, 60 and 70 % dropped, before and after recovery; and at 50 % over α = β, in the domain of the square root and,
at two α, on raw contributions; and what the paper's setting keeps. Writes
`benchmarks/results/selection_quality.{json,md}` and `docs/images/selection_quality.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.judge import hidden_states, judge
from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.contribution import contribution
from hwpq_pipeline.compression.ewma import PAPER, Domain, Threshold, ewma_select, upper_band
from hwpq_pipeline.compression.recovery import recover
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.presets import DAMPING, GAIN
from hwpq_pipeline.progress import with_progress

ROOT = Path(__file__).parents[1]
METRIC, STEPS = "hwpq_weighted", 5
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
ALPHAS = tuple(1 / 2**power for power in range(3, 9))
RAW_ALPHAS = (1 / 8, GAIN)
Choose = Callable[[Tensor, Tensor], Tensor]


def by_sort(sparsity: float) -> Choose:
    """Keep-mask of the highest contributions in every row, by a full sort; ties are broken by position."""

    def choose(weight: Tensor, energy: Tensor) -> Tensor:
        order = contribution(METRIC, weight, energy).argsort(dim=1, stable=True)
        dropped = order[:, : round(sparsity * weight.shape[1])]
        return torch.ones_like(weight, dtype=torch.bool).scatter_(1, dropped, False)

    return choose


def by_ewma(sparsity: float, alpha: float = GAIN, domain: Domain = "sqrt") -> Choose:
    """Keep-mask of the moving average, λ solved for the sparsity."""

    def choose(weight: Tensor, energy: Tensor) -> Tensor:
        chosen = ewma_select(weight, METRIC, energy, Threshold(alpha, alpha, domain, "row", sparsity=sparsity))
        return unpack_bits(chosen.keep, weight.shape[1])

    return choose


def by_paper(weight: Tensor, energy: Tensor) -> Tensor:
    """Keep-mask of the published setting's upper band: α = β = 1/8, λ = 4, the paper's own metric, raw."""
    return unpack_bits(upper_band(weight, "hwpq", energy).keep, weight.shape[1])


def cases() -> Iterator[tuple[dict[str, Any], Choose]]:
    """What is compared."""
    for sparsity in SPARSITIES:
        yield {"method": "sort", "sparsity": sparsity}, by_sort(sparsity)
        yield {"method": "ewma", "sparsity": sparsity, "alpha": GAIN, "domain": "sqrt"}, by_ewma(sparsity)
    swept: tuple[tuple[Domain, tuple[float, ...]], ...] = (("sqrt", ALPHAS), ("raw", RAW_ALPHAS))
    for domain, alphas in swept:
        for alpha in alphas:
            if (domain, alpha) != ("sqrt", GAIN):
                case = {"method": "ewma", "sparsity": 0.5, "alpha": alpha, "domain": domain}
                yield case, by_ewma(0.5, alpha, domain)
    yield {"method": "paper", "sparsity": None, "alpha": PAPER.alpha, "domain": PAPER.domain}, by_paper


class Bench:
    """The dense model, its answer, and the layers to prune."""

    def __init__(self, data: Path) -> None:
        directory = data / "01_raw" / "model"
        self.ids = torch.from_numpy(token_matrix(pd.read_parquet(data / "02_intermediate" / "evaluation.parquet")))
        self.groups = open_groups(directory, data / "03_primary" / "statistics")
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.head = self.model.lm_head.weight.detach().clone()
        self.hidden = hidden_states(self.model, self.ids)
        self.dense = self.judge()["perplexity"]

    def judge(self) -> dict[str, float]:
        """The figures of the model as it stands."""
        return judge(self.model, self.ids, self.hidden, self.head)

    def measure(self, choose: Choose, label: str) -> dict[str, float]:
        """Prune every layer, judge; recover, judge."""
        recovered = []
        dropped = count = 0
        for group in with_progress(self.groups, label, len(self.groups.members())):
            assert group.sums is not None  # noqa: S101 (Bench gives the statistics)
            energy = group.sums.energy()
            mask = torch.cat([choose(group.weight[rows], energy) for _, rows in group.rows])
            dropped, count = dropped + int((~mask).sum()), count + mask.numel()
            self._put(group.rows, group.weight * mask)
            kept = recover(group.original, mask, group.gram, steps=STEPS, damping=DAMPING, where=group.name)
            recovered.append((group.rows, kept.weight))
        before = self.judge()
        for rows, weight in recovered:
            self._put(rows, weight)
        after = self.judge()
        return {
            "reached": dropped / count,
            "perplexity_pruned": before["perplexity"],
            "kl_pruned": before["kl_divergence"],
            "perplexity_recovered": after["perplexity"],
            "kl_recovered": after["kl_divergence"],
        }

    def _put(self, stack: tuple[tuple[Layer, slice], ...], weight: Tensor) -> None:
        for layer, rows in stack:
            self.model.get_submodule(layer.name).weight.data.copy_(weight[rows])


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Selection without a sort: what it costs in quality",
        "",
        f"Dense perplexity {report['dense_perplexity']:.2f}; metric {METRIC}; recovery of {STEPS} steps.",
        "",
        "| dropped | method | α = β | domain | perplexity | after recovery | KL | KL after recovery |",
        "|---:|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        alpha = f"1/{round(1 / row['alpha'])}" if "alpha" in row else ""
        lines.append(
            f"| {row['reached']:.2%} | {row['method']} | {alpha} | {row.get('domain', '')} "
            f"| {row['perplexity_pruned']:.2f} | {row['perplexity_recovered']:.2f} "
            f"| {row['kl_pruned']:.4f} | {row['kl_recovered']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def chart(report: dict[str, Any], target: Path) -> None:
    """Left: over sparsity; right: at 50 % over α, the sort as a level."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = report["rows"]
    styles = {"perplexity_pruned": ("--", "mask alone"), "perplexity_recovered": ("-", "after recovery")}
    for method, colour in (("sort", "tab:gray"), ("ewma", "tab:blue")):
        shown = [row for row in rows if row["method"] == method and row.get("alpha", GAIN) == GAIN]
        shown = [row for row in shown if row.get("domain", "sqrt") == "sqrt"]
        for name, (style, words) in styles.items():
            left.plot(
                [100 * row["sparsity"] for row in shown],
                [row[name] for row in shown],
                style + "o",
                color=colour,
                label=f"{method}, {words}",
            )
    half = [row for row in rows if row["sparsity"] == 0.5]
    swept = sorted((row for row in half if row.get("domain") == "sqrt"), key=lambda row: row["alpha"])
    level = next(row for row in half if row["method"] == "sort")
    for name, (style, words) in styles.items():
        right.plot(
            [row["alpha"] for row in swept],
            [row[name] for row in swept],
            style + "o",
            color="tab:blue",
            label=f"ewma, {words}",
        )
        right.axhline(level[name], linestyle=style, color="tab:gray", label=f"sort, {words}")
    left.set(
        xlabel="weights dropped (%)",
        ylabel="perplexity",
        yscale="log",
        title=f"α = β = 1/{round(1 / GAIN)}, domain sqrt",
    )
    right.set(xlabel="α = β", ylabel="perplexity", title="50 % dropped, domain sqrt")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120, metadata={"Software": None})


def main() -> None:
    """Measure, write after every case, draw."""
    parser = argparse.ArgumentParser(description="Perplexity after EWMA and after an exact sort.")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where a run left model and statistics")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --out, from the same data")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "selection_quality.png")
    options = parser.parse_args()
    keep_freed_memory()
    bench = Bench(options.data)
    report: dict[str, Any] = {"machine": machine(), "dense_perplexity": bench.dense, "rows": []}
    file = options.out / "selection_quality.json"
    earlier = json.loads(file.read_text())["rows"] if options.resume else []
    for case, choose in cases():
        kept = [row for row in earlier if case.items() <= row.items() and ("alpha" in row) == ("alpha" in case)]
        row = kept[0] if kept else case | bench.measure(choose, json.dumps(case))
        print(row, flush=True)
        report["rows"].append(row)
        write_results(options.out, "selection_quality", report, table(report))
    chart(report, options.picture)
    print(table(report))


if __name__ == "__main__":
    main()
