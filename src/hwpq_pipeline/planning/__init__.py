"""An estimate of a run's cost from the model's shapes alone: bytes, memory, seconds.

With n weights in the compressible layers, m other parameters and T tokens:

    export        n·bits/8, a scale of one or two bytes a row or group, 2·m; under a budget what that allows
    statistics    Σ in² · 4 bytes over distinct layer inputs, if they are kept
    on disk       the export, masks of n/8 bytes, the neutral form of about n bytes
    memory        in float32 embedding, head and one decoder block, beside its activations and one layer's work;
                  4·(n + m) bytes for the whole model under a budget or when it is healed
    calibrate     2·T·(n + Σ in²) operations, and again for each variant that asks for sums that are not kept
    evaluate      2·T·(n + 2·head) operations for each variant
    compress      2·out·in² operations a layer, for each step of recovery and sweep of descent;
                  sequential, 2·T·(2·n + 2·Σ in²) more, and the activations of two runs of a block in memory
    healing       2·(n + head) operations for each of its tokens, three times (forward, and back for inputs and
                  weights), and once for the dense model; at most its minutes

A matrix product timed on this machine turns operations into seconds, as if nothing else were done. The estimate tells
minutes from hours; it is not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.planning.costs import healing_seconds, making_operations
from hwpq_pipeline.planning.shapes import Shapes
from hwpq_pipeline.planning.sizes import export_bytes


@dataclass(frozen=True)
class Row:
    """A line of the plan.

    Attributes:
        name: the variant, or the stages that all variants share.
        export_bytes: size of the model that users deploy; 0 if there is none.
        disk_bytes: all bytes that remain on disk.
        seconds: estimated.
    """

    name: str
    export_bytes: int
    disk_bytes: int
    seconds: float


def plan_rows(
    shapes: Shapes,
    recipes: Mapping[str, Recipe],
    *,
    calibration_tokens: int,
    evaluation_tokens: int,
    speed: float,
    sums_kept: bool = True,
) -> list[Row]:
    """The rows of the stages that all variants share, then a row for each variant.

    Args:
        shapes: the dense model's shapes.
        recipes: the variants' recipes, by name.
        calibration_tokens: number of calibration tokens.
        evaluation_tokens: number of evaluation tokens.
        speed: operations a second.
        sums_kept: whether the Gram matrices stay on disk (`calibration.keep`).
    """
    calibrate = 2.0 * calibration_tokens * (shapes.weights + shapes.inputs)
    evaluate = 2.0 * evaluation_tokens * (shapes.weights + 2 * shapes.head)
    rows = [
        Row("fetch", 0, shapes.item * shapes.parameters, 0.0),
        Row("calibrate, reference", 0, 4 * shapes.inputs if sums_kept else 0, (calibrate + evaluate) / speed),
    ]
    for name, recipe in recipes.items():
        export = export_bytes(shapes, recipe)
        masks = shapes.weights // 8 if recipe.selects else 0
        neutral = shapes.weights * (1 if any(part.quantization for part in recipe.parts) else shapes.item)
        seconds = (making_operations(shapes, recipe, calibration_tokens) + evaluate) / speed
        seconds += healing_seconds(shapes, recipe, speed)
        if not sums_kept and recipe.sequence is None and recipe.changes_weights:
            seconds += calibrate / speed
        rows.append(Row(name, export, export + masks + neutral, seconds))
    return rows
