"""Compressed models with random codes and scales, and the weights that they stand for, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hwpq_pipeline.method.recipe import Recipe
from tests.kernels.packed import codes, two_of_four

ROW = {
    "q_proj": 32,
    "k_proj": 16,
    "v_proj": 16,
    "o_proj": 32,
    "gate_proj": 64,
    "up_proj": 64,
    "down_proj": 32,
}
#: Codes of the integer grids.
RANGE = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3), "int2": (-2, 1)}
#: Codes of the 4-bit floats, in halves.
HALVES = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
#: ONNX Runtime's attention wants heads of a multiple of 16; the layers' shapes stay those of `tiny_config()`.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
COLUMNS = {**dict.fromkeys(ROW, 32), "down_proj": 64}


def layer_shapes(blocks: int = 2) -> dict[str, tuple[int, int]]:
    """Linear layers of `tests.tiny.tiny_config()`, written out."""
    shapes = {}
    for block in range(blocks):
        for kind, rows in ROW.items():
            part = "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            shapes[f"model.layers.{block}.{part}.{kind}"] = (rows, COLUMNS[kind])
    return shapes


def random_codes(grid: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Codes all over the grid, a third of them zero."""
    if grid.startswith("fp8"):
        values = 60 * torch.randn(shape, generator=generator)
        if grid == "fp8_e5m2":
            values = values.to(torch.float8_e5m2).float()
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    elif grid not in RANGE:
        codes = HALVES[torch.randint(0, len(HALVES), shape, generator=generator)]
    else:
        low, high = RANGE[grid]
        codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    keep = torch.rand(shape, generator=generator) > 1 / 3
    return torch.where(keep, codes.float(), torch.zeros(())).to(codes.dtype)


def storable(scale: torch.Tensor, grid: str, layer: str) -> dict[str, torch.Tensor]:
    """The layer's scales as numbers that the grid stores."""
    if grid == "nvfp4":
        scale = (scale * 2.0**10).to(torch.float8_e4m3fn).float() / 2.0**10
        return {f"{layer}.scale": scale, f"{layer}.tensor_scale": torch.tensor([2.0**10])}
    return {f"{layer}.scale": 2 ** torch.log2(scale).round() if grid == "mxfp4" else scale}


def make_compressed(
    target: Path,
    grid: str | None,
    *,
    group_size: int | None = None,
    structure: str = "dense",
    bfloat16_scales: bool = False,
    seed: int = 0,
    shapes: dict[str, tuple[int, int]] | None = None,
) -> dict[str, np.ndarray]:
    """Write a compressed model of the tiny one and return its weights, float64, by layer (none for dense)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = layer_shapes() if shapes is None else shapes
    if grid is None and structure == "dense":
        shapes = {}
    tensors, weights = {}, {}
    for layer, (rows, columns) in shapes.items():
        if grid is None:
            weight = 0.1 * torch.randn(rows, columns, generator=generator)
            weight[:, ::2] = 0
            tensors[f"{layer}.weight"] = weight
            weights[layer] = weight.double().numpy()
            continue
        groups = columns // group_size if group_size else 1
        top = -RANGE[grid][0] if grid in RANGE else 448 if grid.startswith("fp8") else 12
        scale = (0.1 + torch.rand(rows, groups, generator=generator)) / (2 * top)
        if bfloat16_scales:
            scale = scale.bfloat16().float()
        codes = random_codes(grid, (rows, columns), generator)
        tensors |= {f"{layer}.codes": codes, **storable(scale, grid, layer)}
        scale = tensors[f"{layer}.scale"]
        spread = np.repeat(scale.double().numpy(), columns // groups, axis=1)
        weights[layer] = codes.double().numpy() * spread
    _write(target, tensors, list(shapes), grid=grid, group_size=group_size, structure=structure)
    return weights


def make_two_of_four(
    target: Path, grid: str | None, group_size: int | None, *, shapes: dict[str, tuple[int, int]] | None = None
) -> dict[str, torch.Tensor]:
    """Write a compressed model of 2:4 layers for the tiny one and return its weights."""
    generator, tensors, weights = torch.Generator().manual_seed(4), {}, {}
    for layer, shape in (shapes or layer_shapes()).items():
        weight = two_of_four(*shape, generator)
        if grid is None:
            tensors[f"{layer}.weight"] = weights[layer] = 0.1 * weight
            continue
        low, high = RANGE.get(grid, (0, 0))
        if 0 < high < 127:
            code = (3 * weight).round().clamp(low, high).to(torch.int8)
        elif grid not in RANGE and not grid.startswith("fp8"):
            code = HALVES[(3 * weight[..., None] - HALVES).abs().argmin(-1)]
        else:
            code = codes("int8" if grid == "int8" else "float8_e4m3fn", weight)
        scale = 0.001 + 0.002 * torch.rand(shape[0], shape[1] // group_size if group_size else 1, generator=generator)
        tensors |= {f"{layer}.codes": code, **storable(scale, grid, layer)}
        scale = tensors[f"{layer}.scale"]
        weights[layer] = code.float() * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    _write(target, tensors, list(weights), grid=grid, group_size=group_size, structure="2of4")
    return weights


def _write(target: Path, tensors: dict[str, torch.Tensor], layers: list[str], **facts: object) -> None:
    """The files of a compressed model, written out by hand."""
    target.mkdir(parents=True)
    if tensors:
        half = len(tensors) // 2 + len(tensors) // 2 % 2  # two files, as a writer a block at a time leaves
        names = sorted(tensors)
        save_file({name: tensors[name] for name in names[:half]}, target / "block_000.safetensors")
        save_file({name: tensors[name] for name in names[half:]}, target / "block_001.safetensors")
    recipe = {"variant": "test", **facts, "recipe": Recipe().to_json(), "layers": layers}
    (target / "recipe.json").write_text(json.dumps(recipe))
