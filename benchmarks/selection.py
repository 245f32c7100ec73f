"""Selection at the speed of memory: EWMA and 2:4 beside a copy of the same bytes and the sort-based rivals.

All methods work on the same arrays in one process, from the stored weight and the inputs' energies to a mask: scores
are part of every method. `copy` copies the weight into memory that was touched before. The rivals get the threads that
torch takes for them and produce a boolean mask; ours produce a packed one.

    copy         weight → weight
    ewma         scores, threshold and packed mask at a given λ: one pass
    ewma_row     the same with λ solved for each row (two passes), ewma_layer with one λ solved for the layer
    two_of_four  2:4 by comparisons
    sort         scores, torch.sort, threshold at the wanted rank; topk and kthvalue find it by torch.topk, kthvalue
    wanda        as its authors compute it: stable sort of the scores, indices of the lowest, scatter
    topk_groups  2:4 by torch.topk on groups of four

A layer of the default model is small. With everything evicted, its time is that of fetching the interpreter's own
code back into the caches. A user waits for the row `SmolLM2-135M`: all its 210 linears one after the other, weights
in memory as before, each method's code warm from the layers before.

Fast methods take turns, so that other work on the machine meets them alike. A slow one gets as many repeats as its
budget of seconds allows, at least one. A method whose mask is wrong on the checked rows gets no time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from benchmarks.selection_rivals import (
    LARGE,
    MODEL,
    QUICK,
    SMALL,
    SPARSITY,
    Case,
    check_rival,
    kthvalue,
    make,
    make_layer,
    sort,
    topk,
    topk_groups,
    wanda,
)
from hwpq_pipeline.compression.bits import pack_bits, unpack_bits
from hwpq_pipeline.compression.contribution import root_factors
from hwpq_pipeline.compression.ewma import TOLERANCE, EwmaSelection, Threshold, ewma_select
from hwpq_pipeline.compression.structured import select_two_of_four
from hwpq_pipeline.kernels import ewma_select as kernels
from hwpq_pipeline.kernels.ewma_select import reference as ewma_reference
from hwpq_pipeline.kernels.two_of_four import reference as two_of_four_reference
from hwpq_pipeline.method.presets import GAIN

METRIC, LAMBDA = "wanda", -0.25
AVERAGE = kernels.Average(alpha=GAIN, beta=GAIN, domain="sqrt")
BY_ROW = Threshold(alpha=GAIN, beta=GAIN, domain="sqrt", scope="row", sparsity=SPARSITY)
#: Before each repeat this memory is written, for at least so many seconds. So every method finds its weight in memory,
#: as it is when a layer has been read, and not in the cache that the method before left it in. OpenMP's workers, which
#: spin for a while after torch's work is done, are asleep by then. (To sleep would not do: a processor that slept
#: starts slowly.)
EVICTION, PAUSE = np.zeros(128 * 2**20, np.uint8), 0.02
OURS = {"ewma": ("sort", "topk", "kthvalue", "wanda"), "ewma_row": ("sort", "topk", "kthvalue", "wanda"),
        "ewma_layer": ("sort", "topk", "kthvalue", "wanda"), "two_of_four": ("topk_groups", "sort")}  # fmt: skip


def copy(case: Case) -> Tensor:
    """The weight to memory that was touched before."""
    return case.target.copy_(case.weight)


def ewma(case: Case) -> kernels.EwmaPass:
    """Scores and mask at a given λ, one pass."""
    factors = root_factors(METRIC, case.weight, case.energy)
    lam = torch.tensor(LAMBDA)
    return kernels.ewma_select(case.weight, factors.column, factors.row, factors.cross, lam, AVERAGE)


def ewma_row(case: Case) -> EwmaSelection:
    """λ solved for each row."""
    return ewma_select(case.weight, METRIC, case.energy, BY_ROW)


def ewma_layer(case: Case) -> EwmaSelection:
    """λ solved for the layer."""
    return ewma_select(case.weight, METRIC, case.energy, replace(BY_ROW, scope="layer"))


def two_of_four(case: Case) -> Tensor:
    """Scores and mask, 2:4."""
    return select_two_of_four(case.weight, METRIC, case.energy).keep


METHODS: dict[str, Callable[[Case], Any]] = {
    method.__name__: method
    for method in (copy, ewma, ewma_row, ewma_layer, two_of_four, sort, topk, kthvalue, wanda, topk_groups)
}


def check(name: str, case: Case, result: Any) -> str:
    """Empty if the result is right on the rows that are looked at, else what is wrong."""
    rows, columns = case.rows, case.weight.shape[1]
    some = case.weight[rows]
    if name == "copy":
        return "" if torch.equal(result[rows], some) else "the copy differs"
    factors = root_factors(METRIC, case.weight, case.energy).rows(rows)
    parts = (factors.column, factors.row, factors.cross)
    if name.startswith("ewma"):
        lam = torch.tensor(LAMBDA) if name == "ewma" else result.multiplier
        lam = lam[rows] if lam.dim() else lam.expand(len(rows))
        expected = pack_bits(ewma_reference.ewma_select(some, *parts, lam, AVERAGE)[0])
        if not torch.equal(result.keep[rows], expected):
            return "the mask differs from the reference"
        missed = name != "ewma" and abs(result.reached - SPARSITY) > TOLERANCE
        return f"reached {result.reached:.4f}" if missed else ""
    if name == "two_of_four":
        expected = two_of_four_reference.select_two_of_four(some, *parts)
        return (
            "" if torch.equal(unpack_bits(result[rows], columns), expected) else "the mask differs from the reference"
        )
    return check_rival(name, case, result[rows])


def measure(cases: list[Case], repeats: int, budget: float) -> dict[str, tuple[str, list[float]]]:
    """For each method what is wrong with its result, and its times over all the layers."""
    found: dict[str, tuple[str, list[float]]] = {}
    fast = []
    tiny = make_layer("16x64", cases[0].weight.dtype)
    for name, method in METHODS.items():
        method(tiny)  # compiles
        wrong, once = "", 0.0
        for case in cases:  # touches the memory that later calls get again
            begin = time.perf_counter()
            result = method(case)
            once += time.perf_counter() - begin
            wrong = wrong or check(name, case, result)
            del result
        if once < 5:
            once = _timed(method, cases)
        found[name] = (wrong, [once])
        if once * repeats <= budget / 10:
            fast.append(name)
        else:
            for _ in range(min(repeats, int(budget / once)) - 1):
                found[name][1].append(_timed(method, cases))
    for _ in range(repeats):
        for name in fast:
            found[name][1].append(_timed(METHODS[name], cases))
    return found


def _timed(method: Callable[[Case], Any], cases: list[Case]) -> float:
    begin = time.perf_counter()
    while True:
        EVICTION[:] = 1
        if time.perf_counter() - begin > PAUSE:
            break
    begin = time.perf_counter()
    for case in cases:
        method(case)
    return time.perf_counter() - begin


def rows_of(
    shape: str, dtype: torch.dtype, found: dict[str, tuple[str, list[float]]], size: int
) -> list[dict[str, Any]]:
    """A row a method; no time where the check failed."""
    right = {name: statistics.median(times) for name, (wrong, times) in found.items() if not wrong}
    rows = []
    for name, (wrong, times) in found.items():
        row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "method": name}
        if wrong:
            rows.append(row | {"error": wrong})
            continue
        seconds = right[name]
        row |= {"seconds": seconds, "repeats": times, "gigabytes_per_second": size / seconds / 1e9}
        row["ratio_to_copy"] = seconds / right["copy"] if "copy" in right else None
        row["times_faster_than"] = {rival: right[rival] / seconds for rival in OURS.get(name, ()) if rival in right}
        rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    about = report["machine"]
    lines = [
        "# Selection: time from weight to mask",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['torch_threads']} threads;",
        f"torch {about['torch']}, numba {about['numba']}.",
        f"Metric {METRIC}, sparsity {SPARSITY}, α = β = 1/{round(1 / GAIN)}.",
        "Medians; GB/s counts the weight's bytes once.",
        "",
        "| shape | dtype | method | ms | GB/s | × copy | repeats | × faster than |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        head = f"| {row['shape']} | {row['dtype']} | {row['method']} |"
        if "error" in row:
            lines.append(f"{head} | | | | {row['error']} |")
            continue
        ratio = "" if row["ratio_to_copy"] is None else f"{row['ratio_to_copy']:.2f}"
        faster = ", ".join(f"{rival} {times:.1f}" for rival, times in row["times_faster_than"].items())
        lines.append(
            f"{head} {1e3 * row['seconds']:.2f} | {row['gigabytes_per_second']:.2f} | {ratio} "
            f"| {len(row['repeats'])} | {faster} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for, print the table, write both files."""
    parser = argparse.ArgumentParser(description="Time selection beside a copy and the sort-based rivals.")
    parser.add_argument(
        "--shapes", nargs="+", default=list(QUICK), help="out x in, as 4096x11008; `large`, `small` or `all` for sets"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20, help="seconds that a slow method may take for its repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sets = {"large": LARGE, "small": (*SMALL, *MODEL), "all": (*SMALL, *MODEL, *LARGE)}
    shapes = [shape for name in options.shapes for shape in sets.get(name, (name,))]
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    for shape in shapes:
        for dtype in (getattr(torch, name) for name in options.dtypes):
            print(f"{shape} {dtype} …", flush=True)
            cases = make(shape, dtype)
            found = measure(cases, options.repeats, options.budget)
            report["rows"] += rows_of(shape, dtype, found, sum(case.weight.nbytes for case in cases))
            write_results(options.out, "selection", report, table(report))
    print(table(report))
    if any("error" in row for row in report["rows"]):
        raise SystemExit("a method's result is wrong: see the table")


if __name__ == "__main__":
    main()
