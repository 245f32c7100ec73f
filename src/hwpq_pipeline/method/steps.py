"""Compressing a group: prune by the masks, recover what is left, round. Each step hands the group on to the next.

`compress_group` is a pure function of the group, its masks and the recipe, and it pickles: a worker in another
process may take it. What comes back holds what is written and what is told, on the CPU, and nothing of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed_writer import tensors_of
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.compression.bits import unpack_bits
from hwpq_pipeline.compression.codes import dequantize
from hwpq_pipeline.compression.recovery import recover
from hwpq_pipeline.compression.refinement import MaskSearch, refine_mask
from hwpq_pipeline.compression.rounding import Descent, quantize
from hwpq_pipeline.compression.structured import check_two_of_four
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Quantization, Recovery


@dataclass(frozen=True)
class CompressedGroup:
    """A group's compressed layers.

    Attributes:
        name: of the input group.
        layers: names, in module order.
        tensors: what the compressed model holds of them (`checkpoints.compressed`), on the CPU.
        facts: by layer name: columns of the layer table.
        grid, group_size: of the codes; None where nothing was rounded, or for one scale a row.
    """

    name: str
    layers: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]]
    grid: str | None = None
    group_size: int | None = None

    def keep(self, parts: Parts) -> str:
        """Write it as a part of its name; the name."""
        told = {"layers": self.layers, "facts": self.facts, "grid": self.grid, "group_size": self.group_size}
        parts.keep(self.name, self.tensors, told)
        return self.name


def compress_group(group: Group, masks: Mapping[str, Tensor], recipe: Recipe) -> CompressedGroup:
    """A group's layers, compressed.

    Args:
        group: with the dense weights and the sums of their inputs.
        masks: packed keep-masks by layer name (`select_group`); read only if the recipe selects.
        recipe: what to do.

    Raises:
        HwpqError: a mask is missing or broken, or a step cannot be taken.
    """
    return packed(take_steps(group, masks, recipe))


def take_steps(group: Group, masks: Mapping[str, Tensor], recipe: Recipe) -> Group:
    """The group after all steps of the recipe for its layers, which it treats alike; see `compress_group`."""
    recipe = recipe.for_layer(group.layers[0].name)
    if group.sums is not None and group.sums.seldom:
        recipe = recipe.without_search
    if recipe.selection is not None:
        group = _prune(group, masks, recipe.structure)
        if recipe.recovery is None:  # a recovery tells the error before and after without a further product
            group = group.with_measured_error("error_pruned")
        elif recipe.recovery.method == "fixed_mask":
            group = _recover(group, recipe.recovery)
        else:
            group = _refine(group, recipe.recovery, recipe.structure)
    if recipe.quantization is not None:
        group = _round(group, recipe.quantization)
    return group


def packed(group: Group) -> CompressedGroup:
    """What is kept of a group once its steps are taken."""
    tensors = {}
    for layer, rows in group.rows:
        if group.quantized is None:
            tensors[f"{layer.name}.weight"] = group.weight[rows]
        else:
            codes, scale = group.quantized.codes[rows], group.quantized.scale[rows]
            tensors |= tensors_of(layer.name, replace(group.quantized, codes=codes, scale=scale))
    names = tuple(layer.name for layer in group.layers)
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    if group.quantized is None:
        return CompressedGroup(group.name, names, on_cpu, group.facts)
    return CompressedGroup(group.name, names, on_cpu, group.facts, group.quantized.grid, group.quantized.group_size)


def _prune(group: Group, masks: Mapping[str, Tensor], structure: str) -> Group:
    try:
        bits = torch.cat([masks[layer.name] for layer in group.layers]).to(group.weight.device)
    except KeyError as error:
        raise HwpqError(
            f"no mask of {error}", where=group.name, remedy="Run the select pipeline for this variant again"
        ) from error
    mask = unpack_bits(bits, group.weight.shape[1])
    if structure == "2of4":
        check_two_of_four(mask, where=group.name)
    for layer, rows in group.rows:
        if not bool(mask[rows].any()):
            raise HwpqError(
                "its mask keeps no weight", where=layer.name, remedy="Run the select pipeline for this variant again"
            )
    return group.with_weight(group.weight * mask, mask=mask)


def _recover(group: Group, recovery: Recovery) -> Group:
    """The best weights on the selected mask."""
    if group.mask is None or recovery.steps is None:  # nothing was pruned
        return group
    found = recover(
        group.original, group.mask, group.gram, steps=recovery.steps, damping=recovery.damping, where=group.name
    )
    pruned = group.with_error("error_pruned", found.errors.before, found.errors.energy)
    return pruned.with_weight(found.weight).with_error("error_recovered", found.errors.after, found.errors.energy)


def _refine(group: Group, recovery: Recovery, structure: str) -> Group:
    """Mask and weights searched together."""
    if group.mask is None or recovery.rounds is None or recovery.sweeps is None:  # nothing was pruned
        return group
    search = MaskSearch(structure, recovery.method, recovery.rounds, recovery.sweeps, recovery.damping)
    heights = [layer.shape[0] for layer in group.layers]
    found = refine_mask(group.original, group.mask, group.gram, search, layer_rows=heights, where=group.name)
    if structure == "2of4":
        check_two_of_four(found.mask, where=group.name)
    pruned = group.with_error("error_pruned", found.errors.before, found.errors.energy)
    refined = pruned.with_weight(found.weight, mask=found.mask)
    return refined.with_error("error_recovered", found.errors.after, found.errors.energy)


def _round(group: Group, quantization: Quantization) -> Group:
    """The weights on the grid. Scales are numbers of the dense checkpoint's dtype: every engine reads them alike."""
    sweeps, damping = quantization.sweeps, quantization.damping
    descent = None if sweeps is None or damping is None else Descent(sweeps, damping)
    quantized = quantize(
        group.weight,
        quantization.grid,
        group_size=quantization.group_size,
        descent=descent,
        mask=group.mask,
        original=group.original,
        gram=group.gram if descent else None,
        scale_dtype=group.dtype,
        where=group.name,
    )
    return group.with_weight(dequantize(quantized), quantized=quantized).with_measured_error("error_quantized")
