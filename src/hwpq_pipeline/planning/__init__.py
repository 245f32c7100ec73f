"""What a run takes, told before it begins: memory, disk, bytes read and seconds of each stage.

Everything but the seconds follows from the model's shapes, the configuration and the variants' recipes: `memory` and
`files` have the arithmetic. Seconds need rates that are timed on this machine (`rates`, `costs`). `limits` says what
cannot fit. `benchmarks/results/plan.md` has plans beside measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.planning.conditions import Conditions, Tokens
from hwpq_pipeline.planning.costs import Seconds
from hwpq_pipeline.planning.files import Files
from hwpq_pipeline.planning.limits import remedy_of
from hwpq_pipeline.planning.memory import Memory
from hwpq_pipeline.planning.need import Need
from hwpq_pipeline.planning.rates import Rates
from hwpq_pipeline.planning.shapes import Shapes

__all__ = ["Conditions", "Need", "Tokens", "plan_stages"]


def plan_stages(
    shapes: Shapes,
    recipes: Mapping[str, Recipe],
    conditions: Conditions,
    *,
    floor: int,
    rates: Rates | None = None,
) -> list[Need]:
    """What each stage takes: those that all variants share, then each variant's.

    Args:
        shapes: of the dense model.
        recipes: the variants', by name.
        conditions: the configuration besides.
        floor: memory of Python and its libraries, bytes.
        rates: of this machine; without them no seconds are planned.
    """
    plan = _Plan(shapes, conditions, rates)
    needs = [*plan.shared(), *(need for name, recipe in recipes.items() for need in plan.of(name, recipe))]
    return [replace(need, memory=floor + need.memory) for need in needs]


@dataclass(frozen=True)
class _Plan:
    shapes: Shapes
    conditions: Conditions
    rates: Rates | None

    @property
    def memory(self) -> Memory:
        return Memory(self.shapes, self.conditions)

    @property
    def files(self) -> Files:
        return Files(self.shapes, self.conditions)

    @property
    def seconds(self) -> Seconds | None:
        return None if self.rates is None else Seconds(self.shapes, self.conditions, self.rates, self.files)

    def shared(self) -> list[Need]:
        memory, files, seconds, model = self.memory, self.files, self.seconds, self.files.model()
        spilled = [
            files.spilled(tokens.item * tokens.count * self.shapes.stream)
            for tokens in (self.conditions.calibration, self.conditions.evaluation)
        ]
        remedy, calibrate = remedy_of(None), memory.calibrate()
        took = (seconds.fetch(), seconds.calibrate(), seconds.reference()) if seconds else (None, None, None)
        return [
            Need("fetch", None, memory.fetch(), 0, model, 0, model, took[0], remedy),
            Need(
                "calibrate", None, calibrate, memory.on_gpu(calibrate), files.statistics(), spilled[0], model,
                took[1], remedy,
            ),
            Need("reference", None, memory.reference(), 0, files.reference(), spilled[1], model, took[2], remedy),
        ]  # fmt: skip

    def of(self, name: str, recipe: Recipe) -> list[Need]:
        memory, files, seconds = self.memory, self.files, self.seconds
        weights, model, remedy = self.shapes.item * self.shapes.weights, files.model(), remedy_of(recipe)
        select, compress = memory.select(recipe), memory.compress(recipe)
        masks, neutral, export = files.masks(recipe), files.compressed(recipe), files.export(recipe)
        sums = files.statistics() if recipe.needs_gram else 0
        took = [getattr(seconds, stage)(recipe) if seconds else None for stage in _STAGES]
        needs = [
            Need(
                "select", name, select, memory.on_gpu(select), masks, 0,
                weights + (sums if recipe.budget else 0) if recipe.selects else 0, took[0], remedy,
            ),
            Need(
                "compress", name, compress, memory.on_gpu(compress), neutral, files.working(recipe),
                weights + sums + masks if recipe.changes_weights else 0, took[1], remedy,
            ),
            Need("export", name, memory.export(recipe), 0, export, 0, model + neutral, took[2], remedy),
        ]  # fmt: skip
        if files.held_by(recipe):
            formats = files.formats(recipe)
            needs.append(
                Need("formats", name, memory.formats(recipe), 0, formats, 0, 2 * model + neutral + formats, took[3])
            )
        read = export + files.reference() + model
        needs.append(Need("evaluate", name, memory.evaluate(recipe), 0, 0, 0, read, took[4], remedy))
        if self.conditions.prompts:
            needs.append(Need("prompts", name, memory.whole(), 0, 0, 0, export))
        return needs


#: What a variant's stages are called in `Seconds`.
_STAGES = ("select", "compress", "export", "formats", "evaluate")
