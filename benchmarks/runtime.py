"""Packed 2:4 in transformers (`hwpq_pipeline.runtime`) beside the dense model: the first token, and each after it.

    python -m benchmarks.runtime
    python -m benchmarks.runtime --models default        the other's rows stay as they are

Two models: the default one (variant `2of4-int8` of `make run`), and one with random weights in the shapes of a Llama of
1.1 billion parameters, in 2:4 and INT8 with embedding and head. Milliseconds of a prompt of 32 tokens (the first new
token), and of each of 32 more; the median of several runs, one model after the other in one process. `compiled` has a
static cache and `torch.compile` (default model alone; it takes minutes). Also the time of one call of the op on a layer
of 8 x 32, where there is next to nothing to compute: what a call costs. Writes `results/runtime.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference import packed, stock
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.kernels.packed_linear import Kernel, packed_linear
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.runtime import load_packed

DATA = Path(__file__).resolve().parents[1] / "data"
FILE, MODELS = RESULTS / "runtime.json", ("default", "1.1B")
PROMPT, NEW, REPEATS = 32, 32, 5
SHAPES: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
DENSE = "dense, bfloat16"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.is_file() else []
    rows = [row for row in rows if row["model"] not in given.models]
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            dense, sparse = default() if name == "default" else random(Path(folder))
            for way, load, compiled in ways(dense, sparse, compiles=name == "default"):
                rows.append({"model": name, "way": way, **milliseconds(load(), compiled=compiled)})
                print(rows[-1], flush=True)
    calls = {kernel: call_microseconds(kernel) for kernel in ("numba", "native")}
    results = {"machine": machine(), "calls": calls, "rows": sorted(rows, key=lambda row: MODELS.index(row["model"]))}
    write_results(RESULTS, FILE.stem, results, render(results))
    print(render(results))


def default() -> tuple[Path, Path]:
    """The dense model of `make run`, and its packed export."""
    return DATA / "01_raw" / "model", DATA / "07_export" / "2of4-int8.formats" / "semi-structured"


def random(folder: Path) -> tuple[Path, Path]:
    """A random model, and its packed export."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dense, compressed = folder / "dense", folder / "compressed"
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES)).bfloat16().save_pretrained(dense)
    compressed.mkdir()
    selection, grid = {"structure": "2of4", "metric": "magnitude"}, {"grid": "int8", "embeddings": "int8"}
    recipe = Recipe.from_variant({"selection": selection, "quantization": grid})
    collect_statistics(dense, torch.arange(64)[None], target=folder / "statistics", dtype="float32")
    write_model(dense, folder / "statistics", recipe, compressed, name="random")
    return dense, export_semi_structured(dense, compressed, folder / "packed")


Ways = Iterator[tuple[str, Callable[[], Any], bool]]


def ways(dense: Path, sparse: Path, *, compiles: bool) -> Ways:
    """Each way's name, how its model is loaded, and whether it is compiled."""
    yield DENSE, lambda: stock(dense, torch.bfloat16), False
    yield "dense, float32", lambda: stock(dense, torch.float32), False
    yield "packed, numba", lambda: load_packed(sparse), False
    yield "packed, native", lambda: load_packed(sparse, native=True), False
    if compiles:
        yield f"{DENSE}, compiled", lambda: stock(dense, torch.bfloat16), True
        yield "packed, native, compiled", lambda: load_packed(sparse, native=True), True


def milliseconds(model: Any, *, compiled: bool) -> dict[str, float]:
    """Of the first token and of each further one."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)
        options["cache_implementation"] = "static"
    ids = torch.arange(100, 100 + PROMPT)[None]

    def run(count: int) -> float:
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options)
        return 1000 * (time.perf_counter() - begun)

    for count in (1, 1 + NEW):  # a static cache of either length is compiled
        run(count)
    pairs = [(run(1), run(1 + NEW)) for _ in range(REPEATS)]
    first, further = [one for one, _ in pairs], [(more - one) / NEW for one, more in pairs]
    middle = statistics.median(further)
    return {
        "first": statistics.median(first), "further": middle, "spread": (max(further) - min(further)) / middle,
    }  # fmt: skip


def call_microseconds(kernel: Kernel) -> float:
    """Of one call of the op on a layer with next to nothing to compute."""
    x = torch.ones(1, 32)
    weight, _ = packed(torch.ones(8, 8, 4).mul_(torch.tensor([1, 1, 0, 0])).view(8, 32), "int8", x)
    found = []
    with torch.inference_mode():
        for _ in range(20):
            begun = time.perf_counter()
            for _ in range(200):
                packed_linear(weight, x, kernel=kernel)
            found.append((time.perf_counter() - begun) / 200)
    return 1e6 * statistics.median(found)


def render(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"Milliseconds in transformers: a prompt of {PROMPT} tokens, and each new token after the first.",
        "",
        "| model | way | first token | each further one | × dense bfloat16 |",
        "|---|---|---:|---:|---:|",
    ]
    base = {row["model"]: row["further"] for row in results["rows"] if row["way"] == DENSE}
    lines += [
        f"| {row['model']} | {row['way']} | {row['first']:.0f} | {row['further']:.1f} (±{row['spread'] / 2:.0%}) | "
        f"{base[row['model']] / row['further']:.2f} |"
        for row in results["rows"]
    ]
    calls = ", ".join(f"{kernel} {micros:.0f} µs" for kernel, micros in results["calls"].items())
    facts = results["machine"]
    where = f"{processor(facts)}, {facts['cores']} cores."
    return "\n".join([*lines, "", f"A call of the op on a layer of 8 × 32: {calls}.", "", where, ""])


if __name__ == "__main__":
    main()
