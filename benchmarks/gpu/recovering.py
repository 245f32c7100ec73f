"""Section `recover`: Gram matrices, recovery at 2:4 and int4 rounding, beside the inner loops of SparseGPT and GPTQ.

All on the same weights and inputs; errors are ‖(W − W₀)X‖²/‖W₀X‖², on the inputs that were summed over (`error`) and on
as many others of the same distribution (`error_held_out`), in float32 without TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.layers import BLOCKS, SHAPES, TOKENS, Layer, make_inputs, make_layer
from benchmarks.gpu.rivals import solve
from benchmarks.gpu.timing import Bench
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.codes import dequantize
from hwpq_pipeline.compression.recovery import output_error, recover
from hwpq_pipeline.compression.rounding import Descent, quantize
from hwpq_pipeline.compression.structured import select_two_of_four
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.kernels import fp8
from hwpq_pipeline.method.presets import DAMPING, PRESETS, ROUNDING_SWEEPS

GROUP, STEPS, SWEEPS = 128, PRESETS["fixed_mask"].steps or 0, ROUNDING_SWEEPS


def gram_of(inputs: Tensor, batch: int = 4096) -> Tensor:
    """As calibration sums it: bfloat16 factors, float32 sums."""
    total = Gram(inputs.shape[1], inputs.device)
    for part in inputs.split(batch):
        total.add(part)
    upper = total.sum.triu()
    return upper + upper.triu(1).T


def run(bench: Bench) -> None:
    """The shapes of the 7B model, and of the 70B the two whose Gram matrix is small enough to be quick."""
    groups = {"tiny": SHAPES["tiny"]} if bench.dry else {"7b": SHAPES["7b"], "70b": {(1024, 8192): 2, (8192, 8192): 2}}
    for model, shapes in groups.items():
        totals: dict[str, float | None] = {}
        for shape, count in shapes.items():
            with bench.guarded(section="recover", model=model, shape=f"{shape[0]}x{shape[1]}", method="make"):
                for method, seconds in one_layer(bench, shape, model).items():
                    sofar = totals.get(method, 0.0)
                    totals[method] = None if seconds is None or sofar is None else sofar + seconds * count
        if model == "70b":
            continue
        for method, seconds in totals.items():  # of layers that were timed one a shape: said so
            if seconds is not None:
                whole = seconds * BLOCKS[model]
                bench.write(section="recover_whole", model=model, method=method, seconds=whole, summed_from_layers=True)


def one_layer(bench: Bench, shape: tuple[int, int], model: str) -> dict[str, float | None]:
    """Each method on one layer; seconds by method."""
    layer = make_layer(shape, bench.device)
    labels: dict[str, Any] = {"section": "recover", "model": model, "shape": layer.name}
    gram, held_out = grams(bench, shape[1], TOKENS[model], labels)
    energy = gram.diagonal().contiguous()
    mask = unpack_bits(select_two_of_four(layer.weight, "hwpq_weighted", energy).keep, shape[1])
    found = {}
    for name, (method, products, tf32) in methods(layer, gram, mask, energy).items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        # A rival's loop is one long call: once, after its libraries have been warmed up on a few columns.
        slow = name.startswith(("sparsegpt", "gptq"))
        if slow:
            with bench.guarded(method=name, **labels):
                few = min(256, shape[1])
                solve(layer.weight[:64, :few], gram[:few, :few].contiguous(), prune=True, group=few // 2)
        found[name] = bench.measure(
            method,
            operations=2.0 * products * shape[0] * shape[1] ** 2 if products else None,
            ceiling="tf32" if tf32 else "float32",
            warm=not slow,
            extra=partial(checked, layer, method, gram, held_out),
            method=name,
            tf32=tf32,
            **labels,
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def grams(bench: Bench, features: int, tokens: int, labels: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of some inputs, and of as many others; the first is timed."""
    both = make_inputs(2 * tokens, features, bench.device)
    inputs = both[:tokens]
    bench.measure(
        lambda: gram_of(inputs), operations=2 * tokens * features**2, method="gram", dtype="bfloat16", **labels
    )
    return gram_of(inputs), gram_of(both[tokens:])


def checked(layer: Layer, method: Callable[[], Tensor], gram: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Relative output errors of a method's result, and its share of zeros."""
    result = method()
    torch.backends.cuda.matmul.allow_tf32 = False
    row: dict[str, Any] = {"zeros": float((result == 0).double().mean())}
    for name, matrix in (("error", gram), ("error_held_out", held_out)):
        wrong, energy = output_error(result, layer.weight, matrix)
        row[name] = float(wrong.double().sum() / energy.double().sum())
    return row


def methods(
    layer: Layer, gram: Tensor, mask: Tensor, energy: Tensor
) -> dict[str, tuple[Callable[[], Tensor], int, bool]]:
    """What is timed: a call that gives the compressed weight, its matrix products, whether in TF32."""
    group = GROUP if layer.weight.shape[1] % GROUP == 0 and layer.weight.shape[1] > GROUP else 32

    def fixed() -> Tensor:
        return recover(layer.weight, mask, gram, steps=STEPS, damping=DAMPING).weight

    def rounded(weight: Tensor, keep: Tensor | None) -> Tensor:
        return dequantize(
            quantize(
                weight, "int4", group_size=group, descent=Descent(SWEEPS, DAMPING), mask=keep, original=layer.weight,
                gram=gram, scale_dtype=torch.bfloat16,
            )
        )  # fmt: skip

    def selected_and_recovered() -> Tensor:
        keep = unpack_bits(select_two_of_four(layer.weight, "hwpq_weighted", energy).keep, layer.weight.shape[1])
        return rounded(recover(layer.weight, keep, gram, steps=STEPS, damping=DAMPING).weight, keep)

    def to_fp8() -> Tensor:
        codes, scale = fp8.quantize(layer.weight, torch.bfloat16)
        return codes.float() * scale

    found: dict[str, tuple[Callable[[], Tensor], int, bool]] = {}
    for tf32 in (False, True):
        suffix = "_tf32" if tf32 else ""
        found[f"mask_2of4{suffix}"] = (lambda: layer.weight.float() * mask, 0, tf32)
        found[f"recover_2of4{suffix}"] = (fixed, STEPS + 2, tf32)
        found[f"int4{suffix}"] = (lambda: rounded(layer.weight, None), SWEEPS + 1, tf32)
        found[f"select_recover_int4{suffix}"] = (selected_and_recovered, STEPS + SWEEPS + 3, tf32)
    del found["mask_2of4_tf32"]
    found["int4_nearest"] = (
        lambda: dequantize(quantize(layer.weight, "int4", group_size=group, scale_dtype=torch.bfloat16)), 0, False,
    )  # fmt: skip
    found["fp8"] = (to_fp8, 0, False)
    found["sparsegpt_2of4"] = (lambda: solve(layer.weight, gram, prune=True), 0, False)
    found["gptq_int4"] = (lambda: solve(layer.weight, gram, group=group), 0, False)
    found["sparsegpt_gptq_2of4_int4"] = (lambda: solve(layer.weight, gram, prune=True, group=group), 0, False)
    return found
