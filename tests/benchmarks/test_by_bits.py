"""The table by bits a weight: what is stored, and which rows count."""

from __future__ import annotations

from typing import Any

from benchmarks.by_bits import STORED, rows, table
from hwpq_pipeline.method.budget import layer_bytes
from hwpq_pipeline.method.sections import Choice, Quantization, Selection

SHAPE = (1536, 576)


def row(task: str, side: str, method: str, perplexity: float, **changes: Any) -> dict[str, Any]:
    return {"task": task, "side": side, "method": method, "perplexity": perplexity, "samples": 32} | changes


def test_bits_are_those_of_the_files() -> None:
    """Against the bytes that a budget counts, which are held to the exports."""
    weights = SHAPE[0] * SHAPE[1]
    for task, bits in STORED.items():
        grid = "int" + task[-1] if task[-4:-1] == "int" else "fp8_e4m3" if task == "fp8" else None
        quantization = grid and Quantization(grid, "nearest", group_size=64 if grid != "fp8_e4m3" else None)
        selection = Selection("2of4", "hwpq") if task.startswith("2of4") else None
        stored = 8 * layer_bytes(SHAPE, Choice(task, selection, quantization or None), packed=True, dense=2)
        assert abs(stored / weights - bits) < 0.04, task


def test_the_best_row_of_each_side_counts_and_a_broken_mask_does_not() -> None:
    peers = {
        "dense_perplexity": 20.0,
        "rows": [
            row("int4", "ours", "slow", 22.0),
            row("int4", "ours", "fast", 24.0),
            row("int4", "peer", "few samples", 21.0, samples=8),
            row("int4", "peer", "gptq", 26.0),
            row("2of4-int4", "peer", "loses zeros", 21.0, note="mask not kept"),
        ],
    }
    healing = {"rows": [{"variant": "2of4-int4-healed", "texts": {"evaluation": {"times_dense": 1.7}}}]}
    assert list(rows(peers, healing)) == [
        (4.25, "int4", "ours", "slow", 1.1),
        (4.25, "int4", "peer", "gptq", 1.3),
        (3.25, "2of4-int4", "ours", "hwpq-quality, healed", 1.7),
    ]
    assert [line.count("**") for line in table(peers, healing).splitlines()[2:]] == [2, 0, 2]
