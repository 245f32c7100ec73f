"""Nodes that make a variant's weights: prune, recover, round. Each adds a step; the last one walks."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.grids import dequantize
from hwpq_pipeline.compression.recovery import recover as recover_weights
from hwpq_pipeline.compression.refinement import refine_mask
from hwpq_pipeline.compression.rounding import quantize as quantize_weights
from hwpq_pipeline.compression.structured import check_two_of_four
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.method.groups import Group, Groups
from hwpq_pipeline.method.sequential import SequentialGroups
from hwpq_pipeline.parameters import Compute, Quantization, Selection, Variant
from hwpq_pipeline.pipelines.tables import layer_table

#: The presets that move the mask: where more rounds or sweeps gained little for their seconds (docs/decisions.md).
REFINEMENTS: dict[str, dict[str, Any]] = {
    "fast": {"method": "descent", "rounds": 2, "sweeps": 1},
    "balanced": {"method": "descent", "rounds": 2, "sweeps": 2},
    "quality": {"method": "descent", "rounds": 2, "sweeps": 1},  # in sequence (parameters.Variant)
    "admm": {"method": "admm", "rounds": 10, "sweeps": 3},
}
ERRORS = ("error_pruned", "error_recovered", "error_quantized")


def prune(
    model: Path,
    statistics: Path,
    samples: pd.DataFrame,
    masks: dict[str, Tensor],
    variant: Variant,
    compute: Compute,
) -> Groups:
    """Apply the selection's masks."""
    device = choose_device(compute.device, tf32=compute.tf32, where="compress")
    sums = Statistics(statistics)
    groups = Groups(Checkpoint(model), layer_map(model), sums, device=device)
    if variant.sequential:
        dtype = getattr(torch, sums.dtype)
        groups = SequentialGroups(groups, token_matrix(samples), damping=variant.damping, dtype=dtype)
    if variant.selection is None:
        return groups
    groups = groups.then(partial(_prune, masks=masks, selection=variant.selection))
    # Recovery tells the error before and after without a further product.
    return groups if variant.recovery else groups.then(lambda group: group.with_measured_error("error_pruned"))


def recover(groups: Groups, variant: Variant) -> Groups:
    """Move the weights that are left towards the dense layer's outputs."""
    if variant.recovery is None or variant.selection is None:
        return groups
    if variant.recovery.preset in REFINEMENTS:
        preset = REFINEMENTS[variant.recovery.preset]
        return groups.then(
            partial(_refine, preset=preset, structure=variant.selection.structure, damping=variant.damping)
        )
    return groups.then(partial(_recover, steps=variant.recovery.steps, damping=variant.damping))


def quantize(groups: Groups, name: str, variant: Variant, scratch: Path) -> tuple[Path, pd.DataFrame, dict[str, float]]:
    """Round, and write each decoder block as soon as its last group is done.

    Returns the directory, the layer table and the seconds that pruning, recovery and rounding took.
    """
    begun = time.perf_counter()
    target = scratch / "compressed"
    target.mkdir()
    if variant.quantization is not None:
        # Scales that are numbers of the dense model's dtype mean the same in every engine (export).
        dtype = groups.checkpoint.torch_dtype
        rounding = partial(_quantize, quantization=variant.quantization, damping=variant.damping, scale_dtype=dtype)
        groups = groups.then(rounding)
    facts: dict[str, dict[str, float]] = {}
    written: list[str] = []
    if variant.selection is not None or variant.quantization is not None:
        for group in groups.run("compress: input groups"):
            write_tensors(target / f"{group.name}.safetensors", _tensors(group))
            facts.update(group.facts)
            written += [layer.name for layer in group.layers]
    write_json(
        target / "recipe.json",
        {
            "variant": name,
            "grid": variant.quantization.grid if variant.quantization else None,
            "group_size": variant.quantization.group_size if variant.quantization else None,
            "structure": variant.selection.structure if variant.selection else "dense",
            "layers": written,
        },
    )
    return target, layer_table(groups.layers, facts, ERRORS), {"compress": time.perf_counter() - begun}


def _prune(group: Group, masks: dict[str, Tensor], selection: Selection) -> Group:
    columns = group.weight.shape[1]
    try:
        packed = torch.cat([masks[f"{layer.name}.keep"] for layer in group.layers]).to(group.weight.device)
    except KeyError as error:
        raise HwpqError(
            f"no mask {error}", where=group.name, remedy="Run the select pipeline for this variant again"
        ) from error
    mask = unpack_bits(packed, columns)
    if selection.structure == "2of4":
        check_two_of_four(mask, where=group.name)
    return group.with_weight(group.weight * mask, mask=mask)


def _recover(group: Group, steps: int, damping: float) -> Group:
    if group.mask is None:  # nothing was pruned, so there is nothing to recover
        return group
    recovered = recover_weights(group.original, group.mask, group.gram, steps=steps, damping=damping, where=group.name)
    energy = recovered.row_energy
    pruned = group.with_error("error_pruned", recovered.row_error_before, energy)
    return pruned.with_weight(recovered.weight).with_error("error_recovered", recovered.row_error, energy)


def _refine(group: Group, preset: dict[str, Any], structure: str, damping: float) -> Group:
    if group.mask is None:  # nothing was pruned, so there is nothing to recover
        return group
    weight, mask, found = refine_mask(
        group.original,
        group.mask,
        group.gram,
        structure=structure,
        **preset,
        damping=damping,
        layer_rows=[layer.shape[0] for layer in group.layers],
        where=group.name,
    )
    if structure == "2of4":
        check_two_of_four(mask, where=group.name)
    pruned = group.with_error("error_pruned", found.row_error_before, found.row_energy)
    refined = pruned.with_weight(weight, mask=mask)
    return refined.with_error("error_recovered", found.row_error, found.row_energy)


def _quantize(group: Group, quantization: Quantization, damping: float, scale_dtype: torch.dtype) -> Group:
    descends = quantization.method == "coordinate_descent"
    quantized = quantize_weights(
        group.weight,
        quantization.grid,
        group_size=quantization.group_size,
        method=quantization.method,
        mask=group.mask,
        original=group.original,
        gram=group.gram if descends else None,
        sweeps=quantization.sweeps,
        damping=damping,
        scale_dtype=scale_dtype,
        where=group.name,
    )
    return group.with_weight(dequantize(quantized), quantized=quantized).with_measured_error("error_quantized")


def _tensors(group: Group) -> dict[str, Tensor]:
    """What the group adds to the compressed model: codes and scales, or weights where nothing was rounded."""
    tensors = {}
    for layer, rows in group.rows:
        if group.quantized is None:
            tensors[f"{layer.name}.weight"] = group.weight[rows]
        else:
            tensors[f"{layer.name}.codes"] = group.quantized.codes[rows]
            tensors[f"{layer.name}.scale"] = group.quantized.scale[rows]
    return {name: tensor.cpu() for name, tensor in tensors.items()}
