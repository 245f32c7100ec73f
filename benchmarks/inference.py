"""How fast the exports run: one layer's decode step, and whole models in every engine that is installed.

**layers**: one token through one linear layer: torch's dense bfloat16 and float32 `Linear` beside the packed 2:4
kernel, by kind of values, and the roofline: the rate at which a copy and a sum read the bytes of the dense
bfloat16 weight. Methods take turns; before each repeat other memory is written, so that every weight comes
from memory, as it does when a model's layers follow each other. A kernel whose result is wrong gets no time.

**models**: tokens a second of prefill and of decoding, by batch, for every variant in transformers (float32, and the
dense model also in bfloat16), in `hwpq_pipeline.runtime` (2:4 variants, packed), in ONNX Runtime, and, where
`make engines` has been run, in vLLM (bfloat16) and llama.cpp. Prefill is a run of one new token; decoding what a run
of more takes beyond it. Ratios are below one for slow-downs. A row is written as soon as it is there, and replaces the
row of that engine and variant of an earlier run: every row says when it was measured and at which load.

    python -m benchmarks.inference                                   all of it
    python -m benchmarks.inference --only layers
    python -m benchmarks.inference --only models --engines llama vllm
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.engines import ask, installed
from benchmarks.inference_tables import render
from benchmarks.machine import machine
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.export import semi_structured
from hwpq_pipeline.export.gguf import export_gguf
from hwpq_pipeline.export.onnx import export_onnx
from hwpq_pipeline.kernels.packed_linear import KINDS, KINDS_OF_INTEGERS, Packed, arrange, packed_linear
from hwpq_pipeline.runtime import load_packed
from hwpq_pipeline.runtime.onnx_session import Array, Session

ROOT = Path(__file__).resolve().parents[1]
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
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--variants", nargs="+", help="all exports, if left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(min(arguments.threads, numba.config.NUMBA_NUM_THREADS))
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # the engines' processes
    file = RESULTS / "inference.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if arguments.only != "models":
        results["layers"] = {"machine": machine(), "rows": [layer(*shape) for shape in SHAPES]}
        write_results(RESULTS, "inference", results, render(results))
    if arguments.only != "layers":
        asked = {
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "threads": arguments.threads,
        }
        before = results.get("models", {})
        rows = before.get("rows", []) if {name: before.get(name) for name in asked} == asked else []
        for row in models(arguments, asked):
            rows = merged(rows, row)
            results["models"] = {"machine": machine(), **asked, "rows": rows}
            write_results(RESULTS, "inference", results, render(results))
    print(render(results))


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a new one in the place of that engine's and variant's, batches it does not have kept; in order."""
    key = (new["engine"], new["variant"])
    old = next((row for row in rows if (row["engine"], row["variant"]) == key), {})
    if "speed" in new:
        again = {entry["batch"] for entry in new["speed"]}
        kept = [entry for entry in old.get("speed", []) if entry["batch"] not in again]
        new = {**new, "speed": sorted([*kept, *new["speed"]], key=lambda entry: entry["batch"])}
    return sorted([row for row in rows if row is not old] + [new], key=lambda row: (row["engine"], row["variant"]))


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
        methods[name], read[name] = partial(linear, given), linear.weight.nbytes
    for kind in KINDS:
        arranged, wanted = packed(weight, kind, x)
        for by, product in (("", by_numba), (", native", by_native)):
            coarse = 0.02 if by_native is product and kind in KINDS_OF_INTEGERS else 1e-3  # its inputs are INT8
            if float((product(arranged, x) - wanted).abs().max()) > coarse * float(wanted.abs().max()):
                raise SystemExit(f"packed {kind}{by} is wrong at {rows} x {columns}: no time for it")
            methods[f"2:4 {kind}{by}"], read[f"2:4 {kind}{by}"] = partial(product, arranged, x), arranged.nbytes
    bits = weight.bfloat16().view(torch.int16)
    target, words = torch.empty_like(bits), bits.view(torch.float32)
    methods |= {"read, by a copy": partial(target.copy_, bits), "read, by a sum": words.sum}
    read |= dict.fromkeys(("read, by a copy", "read, by a sum"), bits.nbytes)
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


def packed(weight: torch.Tensor, kind: str, x: torch.Tensor) -> tuple[Packed, torch.Tensor]:
    """A 2:4 weight packed as a kind, and what it makes of `x`."""
    steps = {"int8": 32.0, "int4": 2.0}.get(kind, 1.0)
    most = {"int8": 127, "int4": 7}.get(kind, float("inf"))
    codes = (steps * weight).round().clamp(-most, most) if kind in KINDS_OF_INTEGERS else weight
    stored = codes.to(getattr(torch, "int8" if kind == "int4" else kind))
    scale = torch.full((weight.shape[0], 1), 1 / steps)
    arranged = arrange(*pack_two_of_four(stored), scale, four_bits=kind == "int4")
    return arranged, x @ (stored.float() * scale).T


def by_numba(weight: Packed, x: torch.Tensor) -> torch.Tensor:
    """The product by numba's kernel."""
    arguments = (weight.values, weight.places, weight.scale, None, KINDS.index(weight.kind), weight.shape[0])
    result: torch.Tensor = torch.ops.hwpq.packed_linear(x, *arguments)
    return result


def by_native(weight: Packed, x: torch.Tensor) -> torch.Tensor:
    """The product by the native kernel."""
    return packed_linear(weight, x, kernel="native")


def evict() -> None:
    """Write other memory for a while (see `PAUSE`)."""
    until = time.perf_counter() + PAUSE
    while True:
        EVICTION[:] = 1
        if time.perf_counter() > until:
            return


def models(arguments: argparse.Namespace, asked: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A row an engine and variant: tokens a second by batch."""
    names = arguments.variants or sorted(
        path.name for path in EXPORTS.iterdir() if path.is_dir() and (path / "config.json").is_file()
    )
    with tempfile.TemporaryDirectory() as folder:
        for engine in arguments.engines:
            for name, variant, speed in MEASURED[engine](names, {**asked, "batches": arguments.batches}, Path(folder)):
                facts = {"at": time.strftime("%Y-%m-%d %H:%M"), "load_before": os.getloadavg()[0]}
                row = {"engine": name, "variant": variant, **facts, **speed()}
                print(row, flush=True)
                yield row


Runs = Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]


def in_transformers(names: list[str], asked: dict[str, Any], _: Path) -> Runs:
    """The exports as they are, in float32, and the dense model in its bfloat16."""
    for name in names:
        if name == "dense":
            yield "transformers, bfloat16", name, partial(speed_of_export, "dense", torch.bfloat16, asked)
        yield "transformers, float32", name, partial(speed_of_export, name, torch.float32, asked)


def in_runtime(names: list[str], asked: dict[str, Any], folder: Path) -> Runs:
    """Packed 2:4."""
    for name in names:
        if CompressedModel(COMPRESSED / name / "model").structure in semi_structured.FORMAT.structures:
            packed = semi_structured.export_semi_structured(MODEL, COMPRESSED / name / "model", folder / name)
            yield "hwpq_pipeline.runtime", name, partial(speed_of_packed, packed, asked)


def in_onnxruntime(names: list[str], asked: dict[str, Any], folder: Path) -> Runs:
    """ONNX files, float32 activations."""
    for name in names:
        made = export_onnx(MODEL, COMPRESSED / name / "model", folder / f"{name}-onnx")
        yield "ONNX Runtime", name, partial(speed_of_onnx, made, asked)


def in_llama(names: list[str], asked: dict[str, Any], folder: Path) -> Runs:
    """GGUF files, each in the type of its grid."""
    for name in names if installed("llama") else []:
        (file,) = export_gguf(MODEL, COMPRESSED / name / "model", folder / f"{name}-gguf").glob("*.gguf")
        kind = file.stem.removeprefix("model-")
        yield f"llama.cpp, {kind}", name, partial(ask, "llama", {"model": file, **asked})


def in_vllm(names: list[str], asked: dict[str, Any], _: Path) -> Runs:
    """The exports as they are, in the model's own bfloat16: vLLM's default, and the only one that its INT4 takes."""
    for name in names if installed("vllm") else []:
        request = {"model": EXPORTS / name, "dtype": "bfloat16", **asked}
        yield "vLLM, bfloat16", name, partial(ask, "vllm", request)


MEASURED: dict[str, Callable[[list[str], dict[str, Any], Path], Runs]] = {
    "transformers": in_transformers, "runtime": in_runtime, "onnxruntime": in_onnxruntime, "llama": in_llama,
    "vllm": in_vllm,
}  # fmt: skip
ENGINES = tuple(MEASURED)


def stock(directory: Path, dtype: torch.dtype) -> Any:
    """An export in stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def ours(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of a torch model by `generate`."""

    def generate(ids: Array, count: int) -> None:
        given = torch.from_numpy(ids)
        model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False, pad_token_id=0)  # fmt: skip

    return speed_of(generate, asked)


def speed_of_export(name: str, dtype: torch.dtype, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of an export in stock transformers."""
    return ours(stock(EXPORTS / name, dtype), asked)


def speed_of_packed(export: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of a packed 2:4 export."""
    return ours(load_packed(export), asked)


def speed_of_onnx(export: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of an ONNX export."""
    return speed_of(Session(export, asked["threads"]).greedy, asked)


def speed_of(generate: Callable[[Array, int], Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of what makes so many new tokens after prompts (batch, length); the better of two runs each."""
    prompt, new = asked["prompt_tokens"], asked["new_tokens"]

    def run(batch: int, count: int) -> float:
        ids = np.arange(batch * prompt).reshape(batch, prompt) % 1000 + 100
        begun = time.perf_counter()
        generate(ids, count)
        return time.perf_counter() - begun

    run(1, 2)
    speed = []
    for batch in asked["batches"]:
        repeats = [(run(batch, 1), run(batch, 1 + new)) for _ in range(2)]
        prefill, longer = (min(times) for times in zip(*repeats, strict=True))
        speed.append({"batch": batch, "prefill": batch * prompt / prefill, "decode": batch * new / (longer - prefill)})
    return {"speed": speed}


if __name__ == "__main__":
    main()
