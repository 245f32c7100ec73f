"""Peak memory of each stage, from shapes: what is there beside Python and its libraries.

With p bytes a number, T tokens in a forward pass, h the width of the residual stream and w the widest activation:

    start         p·(all outside of the blocks), and the largest table once more as it is stored while it is read
    activations   p·T·(4·w + 6·h), of one block: what `method.sequential` divides its chunks by
    sums          4·Σ in² of a block, twice while they are written: safetensors makes a copy of what it writes
    a layer       in float32 the weights of one input group g and its Gram matrix; a copy of each that is scaled;
                  and so many copies of g as the steps hold (`_COPIES`)
    a shard       twice, for the same reason, and the next tensor
    the head      256 rows of logits, and what is made of them at once (`_LOGITS`)

Each stage holds the larger one of its phases, which follow one another. A small model keeps freed memory for the next
tensor (`decoder.memory`), which seldom has the same size: there the stored tables count until the end, and so does
all that is made of a piece of logits (`_KEPT_LOGITS`). The constants count tensors in the code that is named beside
them. `_KEPT_LOGITS`, and the export that runs beside the dense model in `formats`, were found after a plan had missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hwpq_pipeline.checkpoints.writer import SHARD_BYTES
from hwpq_pipeline.decoder.blockwise import LARGE
from hwpq_pipeline.decoder.spool import IN_MEMORY
from hwpq_pipeline.decoder.tokens import samples_at_once
from hwpq_pipeline.evaluation.reference import CHUNK as LOGIT_ROWS
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sequential import ALL_AT_ONCE, CHUNK
from hwpq_pipeline.planning.conditions import Conditions, Tokens
from hwpq_pipeline.planning.shapes import Shapes
from hwpq_pipeline.planning.sizes import export_bytes

#: Copies of a group's weights in float32: two groups read (`method.groups`), and what `compression.contribution` makes.
_SELECTING = 6
#: The same for pruning, refining and rounding (`method.steps`).
_COPIES = 9
#: Copies of 256 rows of logits in `evaluation.reference` and in `evaluation.quality`: at once, and in all.
_LOGITS, _KEPT_LOGITS = (4, 3), (7, 3)


@dataclass(frozen=True)
class Memory:
    """Bytes of each stage beside Python and its libraries.

    Attributes:
        shapes: of the dense model.
        conditions: of the run.
    """

    shapes: Shapes
    conditions: Conditions

    def fetch(self) -> int:
        """One shard as it is written, and the next tensor."""
        return self._shard(self.shapes.item * self.shapes.parameters) + self._stored_tensor

    def calibrate(self) -> int:
        """Embedding and first block; then a block with its sums."""
        tokens, shapes = self.conditions.calibration, self.shapes
        at_once = samples_at_once(min(tokens.batch, tokens.samples), tokens.length, shapes.widest)
        running = tokens.item * shapes.block + self._activations(tokens, at_once)
        hidden = self._spooled(tokens)
        sums = 4 * shapes.block_inputs
        table = tokens.item * shapes.table
        return max(
            self._start(tokens.item, head=False),
            table + running + hidden,
            running + hidden + sums,
            hidden + 2 * sums,
        )

    def reference(self) -> int:
        """Embedding and head; with them a block, or some rows of logits."""
        return self._judging(0)

    def evaluate(self, recipe: Recipe) -> int:
        """As `reference`; a rounded head needs the dense model beside it."""
        both = self._start(self.conditions.evaluation.item, head=True) if recipe.embeddings else 0
        return self._judging(1) + both

    def select(self, recipe: Recipe) -> int:
        """Two groups; under a budget the whole model and one block's inputs and gradients besides."""
        if recipe.budget is None:
            return _SELECTING * 4 * self.shapes.group if recipe.selects else 0
        tokens = self.conditions.calibration
        seen = Tokens(min(recipe.budget.samples, tokens.samples), tokens.length, tokens.batch)
        states = 4 * seen.count * self.shapes.stream * self.shapes.blocks
        return self.whole() + states + 2 * self._activations(seen, seen.samples) + self._steps(recipe)

    def compress(self, recipe: Recipe) -> int:
        """A group with its steps; in sequence a block with its activations besides; healing the whole model."""
        if recipe.sequence is not None:
            needed = self._in_sequence(recipe)
        else:
            needed = self._steps(recipe) if recipe.changes_weights else 0
        if recipe.embeddings:
            needed = max(needed, _COPIES * 4 * self.shapes.table)
        return max(needed, self.healing(recipe)) if recipe.healing is not None else needed

    def healing(self, recipe: Recipe) -> int:
        """Weights, their gradients and two moments of each, the dense model, and one batch with its graph."""
        tokens, shapes = self.conditions.calibration, self.shapes
        batch = 1 if recipe.healing is None else recipe.healing.batch
        seen = Tokens(batch, tokens.length, batch)
        logits = _LOGITS[0] * 4 * seen.count * shapes.tables[-1][0] if shapes.tables else 0
        return 2 * self.whole() + 3 * 4 * shapes.weights + shapes.blocks * 4 * seen.count * shapes.stream + logits

    def export(self, recipe: Recipe) -> int:
        """One shard as it is written, and one layer on the way into it."""
        return self._shard(export_bytes(self.shapes, recipe)) + self._stored_tensor + 4 * self.shapes.largest

    def formats(self, recipe: Recipe) -> int:
        """The export's tensors, the dense model in float32 that it is compared with, and then the export run again.

        `decoder.loading` keeps freed memory, so the export's tables in float32 come beside what the dense model left.
        """
        return self.whole() + 4 * self.shapes.others + 2 * export_bytes(self.shapes, recipe)

    def whole(self) -> int:
        """The model in float32."""
        return 4 * self.shapes.parameters

    def on_gpu(self, stage: int) -> int:
        """What of a stage is on the GPU, if it computes there: as much as it would hold on a CPU, at most."""
        return stage if self.conditions.gpu else 0

    def _start(self, item: int, *, head: bool) -> int:
        outside = self.shapes.others - (0 if head or len(self.shapes.tables) < 2 else self.shapes.head)
        return item * outside + self._stored_tensor

    def _judging(self, against: int) -> int:
        """Of the dense model (0), or of an export against the reference (1), of which a copy is read."""
        tokens, shapes = self.conditions.evaluation, self.shapes
        outside = tokens.item * shapes.others + (shapes.item * sum(map(prod, shapes.tables)) if self.keeps else 0)
        states = self._spooled(tokens) + (1 + against) * 4 * tokens.count * shapes.stream
        rows = min(LOGIT_ROWS, tokens.batch * tokens.length)
        copies = (_KEPT_LOGITS if self.keeps else _LOGITS)[against]
        logits = copies * 4 * rows * (shapes.tables[-1][0] if shapes.tables else 0)
        running = tokens.item * shapes.block + self._activations(tokens, min(tokens.batch, tokens.samples))
        return max(self._start(tokens.item, head=True), outside + states + max(running, logits))

    def _steps(self, recipe: Recipe) -> int:
        sums = 2 * 4 * max(layer.shape[1] for layer in self.shapes.layers) ** 2 if recipe.needs_gram else 0
        return _COPIES * 4 * self.shapes.group + sums

    def _in_sequence(self, recipe: Recipe) -> int:
        tokens, shapes = self.conditions.calibration, self.shapes
        sample = self.sequence_sample()
        states = 2 * min(IN_MEMORY, 4 * tokens.count * shapes.stream)
        whole = tokens.samples * sample
        held = whole if whole <= ALL_AT_ONCE else max(sample, CHUNK) + IN_MEMORY
        widest = max(layer.shape[1] for layer in shapes.layers)
        steps = (_COPIES + 2) * 4 * shapes.group + 2 * 4 * widest**2
        codes = 4 * shapes.block if recipe.structure != "dense" and not recipe.parts[0].quantization else shapes.block
        first = self._start(4, head=False)
        return max(first, 4 * shapes.block + states + held + steps + codes)

    def sequence_sample(self) -> int:
        """Bytes of one sample's activations in a variant in sequence, as `method.sequential` counts them."""
        shapes = self.shapes
        inputs = 3 * shapes.stream + max(layer.shape[1] for layer in shapes.layers)
        return 4 * self.conditions.calibration.length * (inputs + 4 * shapes.widest + 6 * shapes.stream)

    def _activations(self, tokens: Tokens, samples: int) -> int:
        return tokens.item * samples * tokens.length * (4 * self.shapes.widest + 6 * self.shapes.stream)

    def _spooled(self, tokens: Tokens) -> int:
        return min(IN_MEMORY, tokens.item * tokens.count * self.shapes.stream)

    @property
    def keeps(self) -> bool:
        """Whether freed memory is kept for the next tensor."""
        return 4 * self.shapes.block <= LARGE

    @property
    def _stored_tensor(self) -> int:
        """The largest tensor as it is stored."""
        return self.shapes.item * max(self.shapes.table, self.shapes.largest)

    def _shard(self, weights: int) -> int:
        return 2 * min(weights, max(SHARD_BYTES, self._stored_tensor))
