"""Seconds of each stage: what it does, over how fast this machine does it (`rates`).

With T tokens, n weights in the compressible layers, L tokens a sample, h the stream's width and V the vocabulary:

    forward      2·T·(n + 2·L·h a block): the layers, and attention over half of the positions
    sums         1.5·T·Σ in²: a little more than half of the products (`decoder.gram`)
    head         2·T·V·h for the logits, as many for the expected embedding, and the softmax
    in sequence  two forward passes, a third where the tokens come in chunks, the sums, and for what the outputs lack
                 2·T·Σ in², and twice 2·T·n of the layers that write to the stream
    healing      2·(n + V·h) operations for each token, three times (forward, and back for inputs and weights), and once
                 for the dense model; at most its minutes

Not counted: downloads, unpacking of GGUF files, drawing of samples, and imports. All experts count as if every token
went through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hwpq_pipeline.export.comparison import LONG, SHORT
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sequential import ALL_AT_ONCE
from hwpq_pipeline.planning.conditions import Conditions, Tokens
from hwpq_pipeline.planning.files import Files
from hwpq_pipeline.planning.memory import Memory
from hwpq_pipeline.planning.rates import Rates, part_of
from hwpq_pipeline.planning.shapes import Shapes

#: Passes over an export's tensors: read to be evaluated, and to have its zeros counted.
_READ_TO_JUDGE = 2


@dataclass(frozen=True)
class Seconds:
    """Seconds of each stage.

    Attributes:
        shapes: of the dense model.
        conditions: of the run.
        rates: of this machine.
        files: of the run.
    """

    shapes: Shapes
    conditions: Conditions
    rates: Rates
    files: Files

    def fetch(self) -> float:
        """Read, checked and written."""
        return self.rates.opening + self._reading(2 * self.files.model())

    def calibrate(self) -> float:
        """A forward pass, and the sums of its inputs."""
        tokens = self.conditions.calibration
        work = self._forward(tokens) / self.rates.calibrating + self._sums(tokens)
        return 2 * self.rates.opening + work + self._reading(self.files.model() + self.files.statistics())

    def reference(self) -> float:
        """A forward pass of the dense model, and its answers."""
        tokens = self.conditions.evaluation
        work = self._forward(tokens) / self.rates.forward + self._head(tokens, products=2)
        return self.rates.opening + work + self._reading(self.files.model() + self._head_bytes)

    def select(self, recipe: Recipe) -> float:
        """Scores and masks; under a budget a trial of each choice in each layer, and the gradients."""
        if recipe.budget is not None:
            return self._sharing(recipe) + self._selecting(recipe)
        return self._selecting(recipe) if recipe.selects else 0.0

    def compress(self, recipe: Recipe) -> float:
        """The steps on each layer, and the walk if they are in sequence; the healing."""
        if not recipe.changes_weights:
            return 0.0
        reading = self._reading(self.shapes.item * self.shapes.weights + self.files.compressed(recipe))
        if recipe.needs_gram:
            reading += self._reading(self.files.statistics())
        if not self.conditions.sums_kept and recipe.sequence is None:
            reading += self.calibrate()
        steps = sum(self._steps(recipe, layer.name, layer.shape) for layer in self.shapes.layers)
        return self.rates.opening + reading + steps + self._walk(recipe) + self.healing(recipe)

    def healing(self, recipe: Recipe) -> float:
        """Seconds that a variant is healed."""
        if recipe.healing is None:
            return 0.0
        operations = 4 * 2.0 * recipe.healing.tokens * (self.shapes.weights + self.shapes.head)
        return min(60.0 * recipe.healing.minutes, operations / self.rates.product)

    def export(self, recipe: Recipe) -> float:
        """Read, packed and written."""
        read = self.files.model() + self.files.compressed(recipe)
        return 3 * self.rates.opening + self._reading(read + self.files.export(recipe))

    def formats(self, recipe: Recipe) -> float:
        """Written, loaded again, and compared with the whole dense model."""
        made = len(self.files.held_by(recipe))
        prompts = 2 * 2.0 * (SHORT + LONG) * (self.shapes.weights + self.shapes.head) / self.rates.forward
        each = 3 * self.rates.opening + self._reading(2 * self.files.model() + 2 * self.files.export(recipe)) + prompts
        return made * each

    def evaluate(self, recipe: Recipe) -> float:
        """A forward pass of the export, compared with the reference; a second one where the head was rounded."""
        tokens = self.conditions.evaluation
        models = 2 if recipe.embeddings else 1
        work = models * (self._forward(tokens) / self.rates.forward + self._head(tokens, products=1))
        read = _READ_TO_JUDGE * (self.files.export(recipe) + self.files.model()) + self._head_bytes
        return (models + 2) * self.rates.opening + work + self._reading(read)

    @property
    def _head_bytes(self) -> int:
        return 4 * self.shapes.head

    def _reading(self, held: int) -> float:
        return held / self.rates.read

    def _forward(self, tokens: Tokens) -> float:
        attention = 2.0 * tokens.length * self.shapes.stream * self.shapes.blocks
        return 2.0 * tokens.count * (self.shapes.weights + attention)

    def _sums(self, tokens: Tokens) -> float:
        return 1.5 * tokens.count * self.shapes.inputs / self.rates.product

    def _head(self, tokens: Tokens, products: int) -> float:
        entries = self.shapes.tables[-1][0] if self.shapes.tables else 0
        return tokens.count * (products * 2.0 * self.shapes.head / self.rates.product + entries * self.rates.logit)

    def _selecting(self, recipe: Recipe) -> float:
        chosen = recipe if recipe.budget is None else recipe.parts[0]
        found = 0.0
        for layer in self.shapes.layers:
            line = self.rates.select.get(part_of(chosen.for_layer(layer.name)))
            found += line.seconds(layer.shape) if line else 0.0
        return self.rates.opening + self._reading(self.shapes.item * self.shapes.weights) + found

    def _steps(self, recipe: Recipe, layer: str, shape: tuple[int, int]) -> float:
        """Of one layer; under a budget of the choice that takes longest."""
        if recipe.budget is not None and recipe.leaves_open(layer):
            lines = [self.rates.steps.get(part_of(part)) for part in recipe.parts[: len(recipe.budget.choices)]]
        else:
            lines = [self.rates.steps.get(part_of(recipe.for_layer(layer)))]
        return max((line.seconds(shape) for line in lines if line), default=0.0)

    def _sharing(self, recipe: Recipe) -> float:
        if recipe.budget is None:
            return 0.0
        tokens = self.conditions.calibration
        seen = Tokens(min(recipe.budget.samples, tokens.samples), tokens.length, tokens.batch)
        gradients = 4 * self._forward(seen) / self.rates.forward + self._head(seen, products=3)
        lines = [self.rates.steps.get(part_of(part)) for part in recipe.parts[: len(recipe.budget.choices)]]
        trials = sum(line.seconds(layer.shape) for line in lines if line for layer in self.shapes.layers)
        losses = len(lines) * 2.0 * seen.count * self.shapes.weights / self.rates.product
        return gradients + trials + losses + self._reading(self.files.model() + self.files.statistics())

    def _walk(self, recipe: Recipe) -> float:
        if recipe.sequence is None:
            return 0.0
        tokens = self.conditions.calibration
        sample = Memory(self.shapes, self.conditions).sequence_sample()
        passes = 2 if tokens.samples * sample <= ALL_AT_ONCE else 3
        writers = sum(prod(layer.shape) for layer in self.shapes.layers if layer.shape[1] > self.shapes.stream)
        writers += self.shapes.blocks * self.shapes.stream**2
        lacking = 2.0 * tokens.count * (self.shapes.inputs + 2 * writers)
        forward = passes * self._forward(tokens) / self.rates.forward
        return forward + self._sums(tokens) + lacking / self.rates.product
