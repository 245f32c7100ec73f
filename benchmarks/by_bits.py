"""The best model by bits a weight, sparse or dense, ours or theirs: from the contest's rows and the healed variants.

Bits are those of a compressed layer as it is stored, scales included. Pruned weights count what our packed export keeps
of them: half the values, and a bit for the places. The 50 % of no pattern are stored as zeros, in 16 bits, by everyone.
Quality hardly depends on the machine, so the best row of any machine counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.peers.tasks import BITS, GROUP

SAMPLES = 32
SCALE, PLACES = 16 / GROUP, 1.0
#: Of each task, by hand where it has no integers: FP8's scale of a row is a fiftieth of a bit.
STORED: dict[str, float] = {
    "50": 16.0,
    "2of4": 16 / 2 + PLACES,
    "fp8": 8.0,
    **{task: (bits / 2 + PLACES if task.startswith("2of4") else bits) + SCALE for task, bits in BITS.items()},
}
#: The healed variants, as tasks.
HEALED = {"2of4-int4-healed": "2of4-int4"}


def rows(peers: Mapping[str, Any], healing: Mapping[str, Any]) -> Iterator[tuple[float, str, str, str, float]]:
    """Bits, task, side, method and times the dense perplexity: of each task and side the best row."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in peers["rows"]:
        if "perplexity" in row and row["samples"] == SAMPLES and row["task"] in STORED and "note" not in row:
            times = row["perplexity"] / peers["dense_perplexity"]
            name = row["task"], row["side"]
            best[name] = min(best.get(name, (float("inf"), "")), (times, row["method"]))
    for (task, side), (times, method) in best.items():
        yield STORED[task], task, side, method, times
    for row in healing["rows"]:
        if (healed := HEALED.get(row["variant"])) is not None:
            yield STORED[healed], healed, "ours", "hwpq-quality, healed", row["texts"]["evaluation"]["times_dense"]


def table(peers: Mapping[str, Any], healing: Mapping[str, Any]) -> str:
    """The rows as Markdown, by bits and perplexity; the best of each number of bits is bold."""
    ordered = sorted(rows(peers, healing), key=lambda row: (-row[0], row[4]))
    lines = ["| bits a weight | task | side | method | perplexity, × dense |", "|---:|---|---|---|---:|"]
    before = None
    for bits, task, side, method, times in ordered:
        shown = f"{times:.3f}" if bits == before else f"**{times:.3f}**"
        lines.append(f"| {bits:g} | {task} | {side} | {method} | {shown} |")
        before = bits
    return "\n".join(lines)
