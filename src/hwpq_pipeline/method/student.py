"""The compressed model while it is healed: weights that learn, and what the model computes with.

For each parameter of the module tree that holds compressed layers there is a **master**, float32, in which Adam takes
its small steps. The parameter itself holds what the compressed model would: the master, or where the layer has a grid,
`s · round(master / s)`, `s` being the scales that it came with. Parameters of another module form (a stack of experts,
a transposed weight) hold their layers as views, so no form is special here.

**Scales of integers learn too.** A code of few bits moves only when its weight has gone half a step, which Adam's small
steps take long for. So a layer of integers computes with `m · s · round(master / s)`, where the factor `m` of each
group of columns begins at one. Its gradient is `Σ g · s · round(master / s)` over the group: the codes hold still there
(learned step sizes: Esser et al., arXiv 1902.08153). What is computed with is `m · s` as the export stores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.conversion import parameters_of_files
from hwpq_pipeline.checkpoints.layers import Layer, find_blocks, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.codes import Quantized, round_to, scaled
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.method.recipe import Recipe


class Student:
    """A compressed model that learns.

    Args:
        model_dir: the dense checkpoint.
        compressed: its compressed model.
        device: where it runs.

    Attributes:
        model: the causal LM.
        layers: that were compressed.
        tables: the embedding and the head, where they were rounded.
        masters: what learns, float32: of the layers' parameters, then of the blocks' norms, then `factors`.
        device: where it runs.
    """

    def __init__(self, model_dir: str | Path, compressed: CompressedModel, device: torch.device) -> None:
        self.model = load_dense(model_dir, torch.float32, device).requires_grad_(False)
        self.device = device
        found = layer_map(model_dir)
        self.layers = tuple(layer for layer in found if layer.name in compressed.layers)
        self.tables = tuple(table for table in found.tables if table.name in compressed.embeddings)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for table in self.tables:  # rounded before, they stay as they are
            self._parameters[table.place.tensor].data.copy_(
                compressed.dequantized(table.name, table.shape, torch.float32)
            )
        self._scales: dict[str, Quantized] = {}
        for layer in self.layers:
            weight = compressed.dequantized(layer.name, layer.shape, torch.float32)
            if layer.name in compressed.quantized:
                held = compressed.read_quantized(layer.name, layer.shape)
                self._scales[layer.name] = replace(held, codes=held.codes.new_empty(0), scale=held.scale.to(device))
            self._view(layer, self._parameters).copy_(weight)
        self.norms = norms_of(self.model, Checkpoint(model_dir).names)
        self._names = [*dict.fromkeys(layer.place.tensor for layer in self.layers), *self.norms]
        self._stored = Checkpoint(model_dir).torch_dtype
        self._scaled = [layer for layer in self.layers if self._learns_scales(layer)]
        self._factor = {layer.name: torch.ones_like(self._scales[layer.name].scale) for layer in self._scaled}
        self.masters = [self._parameters[name].detach().clone().contiguous() for name in self._names]
        self.masters += self.factors
        recipe = Recipe.from_json(compressed.recipe)
        pruned = [layer for layer in self.layers if recipe.for_layer(layer.name).selection is not None]
        self._kept = {layer.name: self._view(layer, self._by_name) != 0 for layer in pruned}
        for name in self._names:
            self._parameters[name].requires_grad_()

    def _learns_scales(self, layer: Layer) -> bool:
        grid = GRIDS[self._scales[layer.name].grid] if layer.name in self._scales else None
        return grid is not None and not grid.is_float and grid.stored_as == "model"

    @property
    def _by_name(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self.masters[: len(self._names)], strict=True))

    @property
    def factors(self) -> list[Tensor]:
        """Of the scales of layers of integers, (out, groups) each; the last of the masters."""
        return list(self._factor.values())

    @staticmethod
    def _view(layer: Layer, tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> Tensor:
        return layer.place.of(tensors[layer.place.tensor].detach())

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Hand the parameters' gradients to the masters; a weight that is zero in a pruned layer gets none."""
        for name, master in self._by_name.items():
            parameter = self._parameters[name]
            master.grad, parameter.grad = parameter.grad, None
        gradients = {name: master.grad for name, master in self._by_name.items() if master.grad is not None}
        masters = self._by_name
        for layer in self._scaled:
            if layer.place.tensor in gradients:
                factor, kept = self._factor[layer.name], self._scales[layer.name]
                own = self._view(layer, gradients)
                plain = scaled(self._codes(layer, self._view(layer, masters)), kept.scale)
                factor.grad = (own * plain).reshape(*factor.shape, -1).sum(-1)
                own.mul_(factor.repeat_interleave(own.shape[1] // factor.shape[1], dim=1))
        for layer in self.layers:
            if layer.name in self._kept and layer.place.tensor in gradients:
                self._view(layer, gradients).mul_(self._kept[layer.name])

    @torch.no_grad()
    def show_weights(self) -> None:
        """Put the masters, rounded where there is a grid, into the model."""
        masters = self._by_name
        for name in self.norms:
            self._parameters[name].copy_(masters[name])
        for layer in self.layers:
            weight = self._view(layer, masters)
            found = self._rounded(layer, weight)
            self._view(layer, self._parameters).copy_(weight if found is None else scaled(found.codes, found.scale))

    def _codes(self, layer: Layer, weight: Tensor) -> Tensor:
        kept = self._scales[layer.name]
        return round_to(weight.contiguous(), kept.scale, GRIDS[kept.grid])

    def _rounded(self, layer: Layer, weight: Tensor) -> Quantized | None:
        if layer.name not in self._scales:
            return None
        kept, factor = self._scales[layer.name], self._factor.get(layer.name)
        scale = kept.scale
        if factor is not None:  # a number that the export can store; a factor that fell to nothing leaves it as it was
            found = (scale * factor).to(self._stored).float()
            scale = torch.where((found > 0) & found.isfinite(), found, scale)
        return replace(kept, codes=self._codes(layer, weight), scale=scale)

    def results(self) -> Iterator[tuple[Layer, Tensor | Quantized]]:
        """The layers, each with its weight (out, in), float32, or its codes and scales."""
        masters = self._by_name
        for layer in self.layers:
            weight = self._view(layer, masters)
            yield layer, self._rounded(layer, weight) or weight.contiguous()

    def norm_weights(self) -> dict[str, Tensor]:
        """What the norms have become, by their tensor's name in the checkpoint's files."""
        masters = self._by_name
        return {stored: masters[name] for name, stored in self.norms.items()}


def norms_of(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """Parameters of the decoder blocks' norms, each with its name in the checkpoint's files.

    They are the ones of one dimension in modules that are called so. One that the files do not hold as it is, is left
    out: it could not be written.
    """
    path, blocks = find_blocks(model)
    sources = parameters_of_files(model, files)
    found = {}
    for module_name, module in blocks.named_modules():
        if "norm" not in type(module).__name__.lower():
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{module_name}.{own}"
            source = sources.get(name)
            if parameter.dim() == 1 and source is not None and source.converter is None and len(source.patterns) == 1:
                found[name] = next(iter(source.patterns))
    return found
