"""Bytes that each stage leaves on disk, keeps there while it runs, and reads.

    statistics   4·Σ in² over distinct layer inputs, and their diagonals
    reference    of every evaluated position the expected embedding (4·h), its likeliest token and two numbers
    masks        one bit a weight that may be pruned
    compressed   a byte a rounded weight with its scales in float32; four bytes where a weight is pruned alone
    export       `sizes.export_bytes`, and the files beside the weights

Headers of files are left out. Working files hold hidden states past what stays in memory (`decoder.spool`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.decoder.spool import IN_MEMORY
from hwpq_pipeline.export.formats import further_formats
from hwpq_pipeline.method.budget import layer_bytes, table_bytes
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Choice
from hwpq_pipeline.method.sequential import ALL_AT_ONCE
from hwpq_pipeline.planning.conditions import Conditions
from hwpq_pipeline.planning.memory import Memory
from hwpq_pipeline.planning.shapes import Shapes
from hwpq_pipeline.planning.sizes import export_bytes

#: Bytes of a reference's position beside its expected embedding: a token, the likeliest one, two float32.
_POSITION = 8 + 8 + 4 + 4


@dataclass(frozen=True)
class Files:
    """Bytes in files.

    Attributes:
        shapes: of the dense model.
        conditions: of the run.
    """

    shapes: Shapes
    conditions: Conditions

    def model(self) -> int:
        """The dense checkpoint."""
        return self.shapes.item * self.shapes.parameters + self.shapes.side_bytes

    def statistics(self) -> int:
        """Sums of the layers' inputs; where they are not kept, the tokens that they are made of again."""
        return 4 * self.shapes.inputs if self.conditions.sums_kept else 8 * self.conditions.calibration.count

    def reference(self) -> int:
        """The dense model's answer."""
        tokens = self.conditions.evaluation
        return tokens.count * (4 * self.shapes.stream + _POSITION)

    def masks(self, recipe: Recipe) -> int:
        """Keep-masks of the layers that are pruned."""
        if recipe.budget is not None:
            return self.shapes.weights // 8 if recipe.selects else 0
        return sum(prod(layer.shape) for layer in self.shapes.layers if recipe.for_layer(layer.name).selection) // 8

    def compressed(self, recipe: Recipe) -> int:
        """Codes and scales before any engine's format; of a budget's choices those that take most."""
        total = sum(table_bytes(shape, recipe.embeddings, 4) for shape in self.shapes.tables if recipe.embeddings)
        return total + sum(self._neutral(layer, recipe) for layer in self.shapes.layers)

    def export(self, recipe: Recipe) -> int:
        """What users deploy."""
        return export_bytes(self.shapes, recipe) + self.shapes.side_bytes

    def formats(self, recipe: Recipe) -> int:
        """The further formats that can hold the variant; packed 2:4 without its zeros."""
        known, total = further_formats(), 0
        for word in self.held_by(recipe):
            if known[word].structures == ("2of4",):
                layers = sum(self._packed(layer, recipe) for layer in self.shapes.layers)
                total += self.shapes.item * self.shapes.others + layers + self.shapes.side_bytes
            else:
                total += self.export(recipe)
        return total

    def held_by(self, recipe: Recipe) -> list[str]:
        """Those of the formats that are asked for which can hold the variant."""
        known = further_formats()
        grids = {part.quantization.grid if part.quantization else None for part in recipe.parts}
        several = len(grids - {None}) > 1
        return [
            word
            for word in self.conditions.formats
            if not (several and not known[word].mixes)
            and not any(known[word].refusal(recipe.structure, grid) for grid in grids)
        ]

    def working(self, recipe: Recipe) -> int:
        """Of a variant in sequence, in the system's folder for temporary files."""
        if recipe.sequence is None:
            return 0
        tokens, memory = self.conditions.calibration, Memory(self.shapes, self.conditions)
        states = 2 * self.spilled(4 * tokens.count * self.shapes.stream)
        noted = tokens.samples * memory.sequence_sample()
        return states + (self.spilled(noted) if noted > ALL_AT_ONCE else 0)

    def spilled(self, states: int) -> int:
        """What does not stay in memory of so many bytes of hidden states: all, past the limit."""
        return states if states > IN_MEMORY else 0

    def _neutral(self, layer: Layer, recipe: Recipe) -> int:
        if recipe.budget is not None and recipe.leaves_open(layer.name):
            return max(_neutral_bytes(layer, choice) for choice in recipe.budget.choices)
        own = recipe.for_layer(layer.name)
        return _neutral_bytes(layer, Choice("", own.selection, own.quantization))

    def _packed(self, layer: Layer, recipe: Recipe) -> int:
        own = recipe.for_layer(layer.name)
        return layer_bytes(
            layer.shape, Choice("", own.selection, own.quantization), packed=True, dense=self.shapes.item
        )


def _neutral_bytes(layer: Layer, choice: Choice) -> int:
    rows, columns = layer.shape
    if choice.quantization is None:
        return 4 * rows * columns if choice.selection is not None else 0
    size = choice.quantization.group_size
    return rows * columns + 4 * rows * (columns // size if size else 1)
