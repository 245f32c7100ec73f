"""How fast the exports run: one layer's decode step, and whole models in every engine that is installed.

**layers**: one token through one linear layer: torch's dense bfloat16 and float32 `Linear` beside the packed 2:4
kernel, by kind of values. Methods take turns; before each repeat other memory is written, so that every weight comes
from memory, as it does when a model's layers follow each other. A kernel whose result is wrong gets no time.

**models**: tokens a second of prefill and of decoding, by batch, for every variant in transformers (float32, and the
dense model also in bfloat16), in `hwpq_pipeline.runtime` (2:4 variants, packed), and in vLLM and llama.cpp where
`make engines` has been run. Prefill is a run of one new token; decoding what a run of more takes beyond it. Ratios are
against the dense model in the same engine at the same batch, below one for slow-downs.

    python -m benchmarks.inference            all of it
    python -m benchmarks.inference --only layers
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engines import ask, installed
from benchmarks.machine import machine
from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.kernels.packed_matvec import KINDS, cpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
MODEL, COMPRESSED, EXPORTS = (ROOT / "data" / part for part in ("01_raw/model", "06_models", "07_export"))
#: The default model's layers, and LLaMA-2-7B's, which no cache holds.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008))
EVICTION = np.zeros(128 * 2**20, np.uint8)
PAUSE = 0.02  # seconds of writing: OpenMP's workers, which spin after torch's work, are asleep by then
REPEATS = 15


def main() -> None:
    """Measure, print and write `results/inference.{json,md}`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("layers", "models"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--variants", nargs="+", help="all exports, if left out")
    arguments = parser.parse_args()
    file = RESULTS / "inference.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if arguments.only != "models":
        results["layers"] = {"machine": machine(), "rows": [layer(*shape) for shape in SHAPES]}
    if arguments.only != "layers":
        results["models"] = {"machine": machine(), "rows": models(arguments), "prompt_tokens": arguments.prompt_tokens,
                             "new_tokens": arguments.new_tokens}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    text = render(results)
    (RESULTS / "inference.md").write_text(text)
    print(text)


def layer(rows: int, columns: int) -> dict[str, Any]:
    """Median milliseconds of one token by method, for one shape."""
    generator = torch.Generator().manual_seed(rows + columns)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2)
    weight = torch.where(order < 2, torch.randn(rows, columns // 4, 4, generator=generator), 0.0).view(rows, columns)
    x = torch.randn(1, columns, generator=generator)
    methods: dict[str, Callable[[], Any]] = {}
    read: dict[str, int] = {}
    for name, dtype in (("dense bfloat16", torch.bfloat16), ("dense float32", torch.float32)):
        linear, given = torch.nn.Linear(columns, rows, bias=False, dtype=dtype), x.to(dtype)
        linear.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        methods[name], read[name] = (lambda linear=linear, given=given: linear(given)), linear.weight.nbytes
    for kind in KINDS:
        scaled = (32 * weight).round().clamp(-127, 127) if kind == "int8" else weight
        stored = scaled.to(getattr(torch, kind))
        scale = torch.full((rows, 1), 1 / 32 if kind == "int8" else 1.0)
        arranged = cpu.arrange(*pack_two_of_four(stored), scale)
        wanted = (stored.float() * scale) @ x[0]
        if float((cpu.packed_matvec(arranged, x[0]) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max()):
            raise SystemExit(f"packed {kind} is wrong at {rows} x {columns}: no time for it")
        name = f"2:4 {kind}"
        methods[name], read[name] = (lambda arranged=arranged: cpu.packed_matvec(arranged, x[0])), arranged.nbytes
    times: dict[str, list[float]] = {name: [] for name in methods}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):
            for name, method in methods.items():
                evict()
                begun = time.perf_counter()
                method()
                if repeat:  # the first one warms up
                    times[name].append(time.perf_counter() - begun)
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {"shape": [rows, columns], "milliseconds": median, "megabytes": {k: v / 1e6 for k, v in read.items()}}


def evict() -> None:
    """Write other memory for a while (see `PAUSE`)."""
    until = time.perf_counter() + PAUSE
    while True:
        EVICTION[:] = 1
        if time.perf_counter() > until:
            return


def models(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row an engine and variant: tokens a second by batch."""
    names = arguments.variants or sorted(
        path.name for path in EXPORTS.iterdir() if path.is_dir() and (path / "config.json").is_file()
    )
    names = ["dense", *(name for name in names if name != "dense")]
    asked = {"batches": arguments.batches, "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for engine, variant, speed in _runs(names, asked, Path(folder)):
            rows.append({"engine": engine, "variant": variant, **speed()})
            print(rows[-1], flush=True)
    return rows


def _runs(names: list[str], asked: dict[str, Any], folder: Path) -> Any:
    """(engine, variant, what measures it), one after the other."""
    from hwpq_pipeline.export.gguf import export_gguf
    from hwpq_pipeline.export.semi_structured import export_semi_structured
    from hwpq_pipeline.runtime import load_packed

    yield "transformers, bfloat16", "dense", lambda: ours(stock(EXPORTS / "dense", torch.bfloat16), asked)
    for name in names:
        yield "transformers, float32", name, lambda name=name: ours(stock(EXPORTS / name, torch.float32), asked)
    for name in names:
        if json.loads((COMPRESSED / name / "model" / "recipe.json").read_text())["structure"] == "2of4":
            packed = export_semi_structured(MODEL, COMPRESSED / name / "model", folder / name)
            yield "hwpq_pipeline.runtime", name, lambda packed=packed: ours(load_packed(packed), asked)
    for name in names if installed("llama") else []:
        (file,) = export_gguf(MODEL, COMPRESSED / name / "model", folder / f"{name}-gguf").glob("*.gguf")
        yield (
            f"llama.cpp, {file.stem.removeprefix('model-')}",
            name,
            lambda file=file: ask("llama", {"model": file, **asked}),
        )
    for name in names if installed("vllm") else []:
        yield "vLLM, float32", name, lambda name=name: ask("vllm", {"model": EXPORTS / name, **asked})


def stock(directory: Path, dtype: torch.dtype) -> Any:
    """An export in stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def ours(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of a torch model by `generate`."""
    prompt, new = asked["prompt_tokens"], asked["new_tokens"]

    def run(batch: int, count: int) -> float:
        ids = torch.arange(batch * prompt).view(batch, prompt) % 1000 + 100
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        return time.perf_counter() - begun

    run(1, 2)
    speed = []
    for batch in asked["batches"]:
        repeats = [(run(batch, 1), run(batch, 1 + new)) for _ in range(2)]
        prefill, longer = (min(times) for times in zip(*repeats, strict=True))
        speed.append({"batch": batch, "prefill": batch * prompt / prefill, "decode": batch * new / (longer - prefill)})
    return {"speed": speed}


def render(results: dict[str, Any]) -> str:
    """The Markdown of `results/inference.md`."""
    parts = [
        "# Speed of the exports",
        "Made by `make bench-inference`; ratios are within one run, not across machines.",
    ]
    if "layers" in results:
        parts += [
            "## One token through one layer",
            _machine(results["layers"]),
            *_layer_tables(results["layers"]["rows"]),
        ]
    if "models" in results:
        parts += ["## Whole models, tokens a second", _machine(results["models"]), _models_text(results["models"])]
    return "\n\n".join(parts) + "\n"


def _machine(part: dict[str, Any]) -> str:
    info = part["machine"]
    return (
        f"{info['cores']} cores of {info['processor']} ({info['capability']}), torch {info['torch']}, "
        f"numba {info['numba']}, load {info['load_before']:.1f} before."
    )


def _layer_tables(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["milliseconds"])
    head = "| out × in | " + " | ".join(names) + " |\n|---|" + "---|" * len(names)

    def table(value: Callable[[dict[str, Any], str], str]) -> str:
        lines = [
            f"| {row['shape'][0]} × {row['shape'][1]} | " + " | ".join(value(row, name) for name in names) + " |"
            for row in rows
        ]
        return "\n".join([head, *lines])

    def times_faster(than: str) -> Callable[[dict[str, Any], str], str]:
        return lambda row, name: f"{row['milliseconds'][than] / row['milliseconds'][name]:.2f}"

    return [
        "Milliseconds, median:", table(lambda row, name: f"{row['milliseconds'][name]:.3f}"),
        "Times as fast as dense bfloat16:", table(times_faster("dense bfloat16")),
        "Times as fast as dense float32:", table(times_faster("dense float32")),
        "Megabytes that the weight takes:", table(lambda row, name: f"{row['megabytes'][name]:.2f}"),
    ]  # fmt: skip


def _models_text(part: dict[str, Any]) -> str:
    rows = part["rows"]
    batches = [entry["batch"] for row in rows for entry in row.get("speed", [])]
    batches = sorted(set(batches))
    head = ["engine", "variant", *(f"{kind}, batch {batch}" for kind in ("prefill", "decode") for batch in batches)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['engine']} | `{row['variant']}` | does not load: {row['error'][:200]} |")
            continue
        cells = [_cell(rows, row, kind, batch) for kind in ("prefill", "decode") for batch in batches]
        lines.append(f"| {row['engine']} | `{row['variant']}` | " + " | ".join(cells) + " |")
    asked = f"{part['prompt_tokens']} prompt tokens, {part['new_tokens']} new ones a sequence."
    return f"{asked} In brackets: × the dense model of the same engine.\n\n" + "\n".join(lines)


def _cell(rows: list[dict[str, Any]], row: dict[str, Any], kind: str, batch: int) -> str:
    def value(of: dict[str, Any]) -> float:
        return next((float(entry[kind]) for entry in of.get("speed", []) if entry["batch"] == batch), float("nan"))

    engine = "transformers, float32" if row["engine"].startswith("hwpq") else row["engine"]
    family = engine.partition(",")[0] if engine.startswith("llama") else engine
    dense = next((r for r in rows if r["variant"] == "dense" and r["engine"].startswith(family)), None)
    ratio = f" ({value(row) / value(dense):.2f})" if dense else ""
    return f"{value(row):.1f}{ratio}"


if __name__ == "__main__":
    main()
