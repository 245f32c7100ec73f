"""The 4-bit floating point formats of current GPUs: rounded to nearest by the library and by us, and by our descent.

    make bench-number-formats

On the default model, with the tokens and statistics that `kedro run --pipelines calibrate,reference` left in `data/`.
The library's rows are compressed-tensors' own arithmetic: scales from the least and the greatest weight, nearest codes,
which is what llm-compressor's round-to-nearest does without calibration. Ours are exported, and transformers loads the
exports. Writes `benchmarks/results/number_formats.{json,md}`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.judge import hidden_states, judge, linears
from benchmarks.machine import machine, processor
from benchmarks.output import RESULTS, write_results
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.decoder.memory import keep_freed_memory
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model

ROOT = Path(__file__).parents[1]
#: The library's preset, bits a weight with scales, and the columns that share one.
FORMATS = {"nvfp4": ("NVFP4A16", 4.5, 16), "mxfp4": ("MXFP4A16", 4.25, 32)}
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "nearest"},
    "descent": {"method": "coordinate_descent"},
    "descent, in sequence": {"method": "coordinate_descent"},
}


@torch.inference_mode()
def by_library(model: Any, preset: str) -> None:
    """Round all layers of a model in place by the library's own functions."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = preset_name_to_scheme(preset, ["Linear"]).weights
    for _, layer in linears(model):
        weight = layer.weight.data
        groups = weight.unflatten(1, (-1, arguments.group_size))
        low, high = groups.amin(2), groups.amax(2)
        shared = generate_gparam(weight.min(), weight.max()) if arguments.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, arguments, global_scale=shared)
        weight.copy_(fake_quantize(weight, scale, zero, arguments, global_scale=shared))


def loaded(path: Path) -> Any:
    """A checkpoint in transformers, float32."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rows(data: Path, formats: list[str], tokens: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each format and way."""
    model_dir = data / "01_raw" / "model"
    calibration = token_matrix(pd.read_parquet(data / "02_intermediate" / "calibration.parquet"))
    dense = loaded(model_dir)
    hidden, head = hidden_states(dense, tokens), dense.lm_head.weight.float().clone()
    yield {"format": "dense", "bits": 16.0, "way": "", "seconds": 0.0, **judge(dense, tokens, hidden, head)}
    for name in formats:
        preset, bits, size = FORMATS[name]
        model, begun = loaded(model_dir), time.perf_counter()
        by_library(model, preset)
        row = {"format": name, "bits": bits, "way": "library, nearest", "seconds": time.perf_counter() - begun}
        yield {**row, **judge(model, tokens, hidden, head)}
        for way, options in WAYS.items():
            quantization = {"grid": name, "group_size": size, **options}
            recipe = Recipe.from_variant({"quantization": quantization, "sequential": way.endswith("sequence")})
            with tempfile.TemporaryDirectory() as folder:
                begun, made = time.perf_counter(), Path(folder) / "made"
                made.mkdir()
                write_model(model_dir, data / "03_primary" / "statistics", recipe, made, name=name, tokens=calibration)
                seconds = time.perf_counter() - begun
                export = loaded(export_checkpoint(model_dir, made, Path(folder) / "export"))
            yield {"format": name, "bits": bits, "way": way, "seconds": seconds, **judge(export, tokens, hidden, head)}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    dense = report["rows"][0]["perplexity"]
    lines = [
        "| format | bits a weight | rounding | perplexity | × dense | divergence, nats a token | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['format']} | {row['bits']:g} | {row['way']} | {row['perplexity']:.2f} | "
        f"{row['perplexity'] / dense:.3f} | {row['kl_divergence']:.4f} | {row['seconds']:.0f} |"
        for row in report["rows"]
    ]
    place = processor(report["machine"])
    return "\n".join([*lines, "", f"{report['tokens']}. Seconds without calibration. {place}", ""])


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    keep_freed_memory()
    tokens = torch.from_numpy(token_matrix(pd.read_parquet(options.data / "02_intermediate" / "evaluation.parquet")))
    told = f"{tokens.shape[0]} × {tokens.shape[1]} evaluation tokens"
    report: dict[str, Any] = {"machine": machine(), "tokens": told, "rows": []}
    for row in rows(options.data, options.formats, tokens):
        report["rows"].append(row)
        write_results(options.out, "number_formats", report, table(report))


if __name__ == "__main__":
    main()
