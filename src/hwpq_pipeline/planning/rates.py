"""How fast this machine does what a run consists of, each timed on a small sample of the real thing.

    forward    a feed-forward part on some tokens: three products and the activation between them
    product    a plain float32 product
    logits     softmax and its sums, a logit at a time
    read       a tensor compared with its checksum, checked and cast
    opening    a model built from its config without weights, which every stage does
    steps      the variant's own steps (selecting, and pruning, refining, rounding) on random layers of two widths

The cost of a weight in the steps is taken for `a + b·in`: two widths give a and b. So kernels, products and elementwise
work count each as they are on this machine. The least of some runs counts: another program's work is not the stage's. A
kernel is compiled before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.checksums import crc32
from hwpq_pipeline.checkpoints.layers import Layer, layer_map, meta_model
from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.method.blocks import LiveSums
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.sections import Quantization, Recovery, Selection, Sequence
from hwpq_pipeline.method.select import select_group
from hwpq_pipeline.method.steps import packed, take_steps
from hwpq_pipeline.planning.shapes import Shapes

#: What tells one layer's steps from another's.
Part = tuple[Selection | None, Recovery | None, Quantization | None, Sequence | None]
_ROWS, _TOKENS, _WIDE, _TIMES = 512, 512, 1024, 3
_LOGIT_ROWS, _LOGITS, _READ = 64, 8192, 2**23


@dataclass(frozen=True)
class Line:
    """Seconds of a weight in a layer with `in` inputs: `weight + each · in`."""

    weight: float
    each: float

    def seconds(self, shape: tuple[int, int]) -> float:
        """Of a layer."""
        return shape[0] * shape[1] * (self.weight + self.each * shape[1])


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, or needs for one.

    Attributes:
        forward: operations a second of a forward pass in float32.
        calibrating: the same in the dtype of calibration.
        product: operations a second of a float32 product.
        logit: seconds of a logit.
        read: bytes a second.
        opening: seconds to build the model.
        select, steps: by `Part`, seconds of a weight.
    """

    forward: float
    calibrating: float
    product: float
    logit: float
    read: float
    opening: float
    select: dict[Part, Line]
    steps: dict[Part, Line]


def part_of(recipe: Recipe) -> Part:
    """What is done to a layer, by a recipe for it alone."""
    return recipe.selection, recipe.recovery, recipe.quantization, recipe.sequence


def measure_rates(
    model: str | Path, shapes: Shapes, recipes: Iterable[Recipe], *, item: int, device: torch.device
) -> Rates:
    """Time all of it; some seconds.

    Args:
        model: the dense checkpoint.
        shapes: its shapes.
        recipes: whose steps are timed.
        item: bytes of a number that calibration computes in.
        device: where the layers are worked on.
    """
    parts: dict[Part, Recipe] = {}
    for recipe in recipes:
        for one in recipe.parts:
            alone = one.for_layer("sample")
            if alone.changes_weights:
                parts.setdefault(part_of(alone), alone)
    wide = min(_WIDE, -(-shapes.widest // 256) * 256)
    select, steps = {}, {}
    with torch.inference_mode():
        for part, recipe in parts.items():
            select[part], steps[part] = _lines(recipe, wide, device)
        low = torch.float32 if item == 4 else torch.bfloat16
        return Rates(
            forward=_forward(shapes, torch.float32, torch.device("cpu")),
            calibrating=_forward(shapes, low, device),
            product=_product(device),
            logit=_logit(),
            read=_read(),
            opening=_seconds(lambda: (meta_model(model), layer_map(model)), times=1),
            select=select,
            steps=steps,
        )


def _lines(recipe: Recipe, wide: int, device: torch.device) -> tuple[Line, Line]:
    """Seconds of a weight where it is selected, and in the steps after that."""
    _sample(recipe, 8, wide // 2, device)  # compiles the kernels
    few, many = (
        [min(times) for times in zip(*(_sample(recipe, _ROWS, width, device) for _ in range(_TIMES)), strict=True)]
        for width in (wide // 2, wide)
    )
    return _line(few[0], many[0], wide), _line(few[1], many[1], wide)


def _line(few: float, many: float, wide: int) -> Line:
    """Through seconds of a weight at half the width and at the width, neither part below zero."""
    each = max(0.0, (many - few) / (wide - wide // 2))
    return Line(max(0.0, many - each * wide), each)


def _sample(recipe: Recipe, rows: int, width: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a weight: selected; and pruned, recovered, rounded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator).to(device)
    # Fewer than the widest has columns: conjugate gradients then take all their steps, as on real inputs.
    inputs = torch.randn(_ROWS, width, generator=generator).to(device)
    layer = Layer("sample", 0, (rows, width), Matrix("sample"), Matrix("sample"))
    group = Group("sample", (layer,), LiveSums(inputs.T @ inputs), torch.bfloat16, weight, weight)
    begun = time.perf_counter()
    masks = select_group(group, recipe).masks
    between = time.perf_counter()
    if recipe.sequence is not None:
        corrected_target(
            weight, group.gram, weight, steps=recipe.sequence.steps, damping=recipe.sequence.damping, where="sample"
        )
    packed(take_steps(group, masks, recipe))
    return (between - begun) / weight.numel(), (time.perf_counter() - between) / weight.numel()


def _forward(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> float:
    stream = min(shapes.stream, _WIDE)
    wide = max(1, round(shapes.widest * stream / shapes.stream))
    x = torch.ones(_TOKENS, stream, dtype=dtype, device=device)
    up, down = x.new_ones(wide, stream), x.new_ones(stream, wide)

    def work() -> Tensor:
        made = nn.functional.silu(nn.functional.linear(x, up)) * nn.functional.linear(x, up)
        return nn.functional.linear(made, down).cpu()

    return 6.0 * _TOKENS * stream * wide / _seconds(work)


def _product(device: torch.device) -> float:
    one = torch.ones(_WIDE, _WIDE, device=device)
    return 2.0 * _WIDE**3 / _seconds(lambda: float(torch.mm(one, one)[0, 0]))


def _logit() -> float:
    logits = torch.ones(_LOGIT_ROWS, _LOGITS)

    def work() -> Tensor:
        logs = logits - logits.logsumexp(-1, keepdim=True)
        return (logs.exp() * logs).sum(-1) + logs.argmax(-1)

    return _seconds(work) / logits.numel()


def _read() -> float:
    stored = torch.ones(_READ, dtype=torch.bfloat16)
    return stored.nbytes / _seconds(lambda: (crc32([stored]), torch.isfinite(stored.float()).all()))


def _seconds(work: Callable[[], object], times: int = _TIMES) -> float:
    """The least of some runs, after one that is not timed."""
    work()
    return min(map(_timed, [work] * times))


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return max(time.perf_counter() - begun, 1e-9)
