"""One run of ours: model in memory, the method, the judge. Runs in the project's environment.

Called by the contest with one JSON argument (see `contest.Job`); the answer goes to the file that it names. The clock
runs over calibration (which reads the checkpoint and writes statistics to disk), selection, recovery, rounding,
writing the compressed model, reading it and putting it into the model in memory: more than the peers are asked for.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.judge import broken_fours, judge, linears, zeros_by_layer
from benchmarks.peers.tasks import BITS, GROUP
from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.compression.codes import dequantize
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model

#: Of a 16-bit scale, for each weight of its group.
SCALE_BITS = 16 / GROUP
CHOICES = ["int8", "int4-32", "int4-64", "int3-32", "int3-64", "int2-32", "int2-64"]
VARIANTS = Path(__file__).parents[2] / "conf" / "base" / "parameters_variants.yml"


def recipe_of(task: str, method: str) -> Recipe:
    """The recipe that answers a task: `hwpq-<preset>`, or what rounds only, as `nearest`."""
    variant: dict[str, Any] = {"sequential": method == "hwpq-sequential"}
    if task.startswith("2of4"):
        variant["selection"] = {"structure": "2of4"}
    elif task == "50":
        variant["selection"] = {"structure": "unstructured", "sparsity": 0.5}
    if "selection" in variant:
        variant["recovery"] = {"preset": method.removeprefix("hwpq-")}
    if task == "fp8":
        variant["quantization"] = {"grid": "fp8_e4m3"}
    elif method == "hwpq-budget":
        bits = {"bits_per_weight": BITS[task] + SCALE_BITS, "choices": CHOICES}
        variant |= {"sequential": True, "budget": bits}
    elif task in BITS:
        rounding = "nearest" if method == "nearest" else "coordinate_descent"
        variant["quantization"] = {"grid": f"int{BITS[task]}", "group_size": GROUP, "method": rounding}
    return Recipe.from_variant(variant)


def put(compressed: Path, model: nn.Module) -> None:
    """The compressed weights into the model."""
    source = CompressedModel(compressed)
    for layer in source.layers:
        weight = model.get_parameter(f"{layer}.weight")
        if layer in source.quantized:
            weight.data.copy_(dequantize(source.read_quantized(layer, tuple(weight.shape))))
        else:
            weight.data.copy_(source.read_weight(layer, tuple(weight.shape)))
    for name, tensor in source.replaced().items():
        model.get_parameter(name).data.copy_(tensor)


def round_activations(model: nn.Module) -> None:
    """FP8 as deployed: the inputs of the compressed layers rounded to E4M3, one scale a token."""

    def rounded(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        scale = arguments[0].abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        return ((arguments[0] / scale).to(torch.float8_e4m3fn).to(arguments[0].dtype) * scale,)

    for _, layer in linears(model):
        layer.register_forward_pre_hook(rounded)


def run(job: dict[str, Any], calibration: Tensor, model: nn.Module, scratch: Path) -> None:
    """What is timed."""
    model_dir = Path(job["model"])
    if job["task"] == "seven":
        shipped = yaml.safe_load(VARIANTS.read_text())["variants"]
        recipes = {name: Recipe.from_variant(values) for name, values in shipped.items() if "healing" not in values}
    else:
        recipes = {"variant": recipe_of(job["task"], job["method"])}
    statistics, tokens = None, calibration[: job["samples"]]
    if any(recipe.needs_text for recipe in recipes.values()):
        statistics = scratch / "statistics"
        mode = "gram" if any(recipe.needs_gram for recipe in recipes.values()) else "diagonal"
        collect_statistics(model_dir, tokens, target=statistics, mode=mode, dtype=job["dtype"])
    for name, recipe in recipes.items():
        (scratch / name).mkdir()
        write_model(model_dir, statistics, recipe, scratch / name, name=name, tokens=tokens)
    compressed = [scratch / name for name in recipes]
    put(compressed[-1], model)


def main() -> None:
    """Compress under the clock, then judge."""
    job = json.loads(sys.argv[1])
    tensors = load_file(job["inputs"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        run(job, tensors["calibration"], model, Path(scratch))
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {"seconds": seconds, "peak_rss_bytes": peak}
    if job["task"] != "seven":
        if job["task"] == "fp8":
            round_activations(model)
        found |= judge(model, tensors["evaluation"], tensors["dense_hidden"], tensors["head"])
        found["zeros"] = zeros_by_layer(model)
    if job["task"] == "2of4":
        found["broken_fours"] = broken_fours(model)
    Path(job["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
