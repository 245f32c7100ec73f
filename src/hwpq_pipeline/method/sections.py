"""The sections of a recipe, in plain numbers. What a section does not use is None."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Which weights stay (`compression.structured`, `compression.ewma`).

    Attributes:
        structure: `2of4` or `unstructured`.
        metric: contribution metric (saliency).
        sparsity, multiplier: of `unstructured`, the wanted share of zeros or a given λ; the other is None.
        domain: of `unstructured`, where the average moves: `sqrt`, `log` or `raw` contributions.
        alpha, beta: of `unstructured`, gains of the moving mean and deviation.
        scope: of `unstructured`, one λ a `row` or a `layer`.
    """

    structure: str
    metric: str
    sparsity: float | None = None
    multiplier: float | None = None
    domain: str | None = None
    alpha: float | None = None
    beta: float | None = None
    scope: str | None = None


@dataclass(frozen=True)
class Recovery:
    """How the weights that stay make up for those that go (`compression.recovery`, `compression.refinement`).

    Attributes:
        preset: the name that the variant gave.
        method, steps, rounds, sweeps: what it stands for; see `Preset`.
        damping: see above.
    """

    preset: str
    method: str
    damping: float
    steps: int | None = None
    rounds: int | None = None
    sweeps: int | None = None


@dataclass(frozen=True)
class Quantization:
    """How the weights are rounded (`compression.rounding`).

    Attributes:
        grid: number format of the codes.
        method: `nearest` or `coordinate_descent`.
        group_size: columns that share a scale; None for one scale a row.
        sweeps, damping: of coordinate descent.
    """

    grid: str
    method: str
    group_size: int | None = None
    sweeps: int | None = None
    damping: float | None = None


@dataclass(frozen=True)
class Sequence:
    """How the layers are compressed in order, each on what the compressed ones before it give (`method.sequential`).

    Attributes:
        steps: conjugate-gradient steps of the correction (`compression.correction`).
        damping: of the correction.
    """

    steps: int
    damping: float


@dataclass(frozen=True)
class Choice:
    """What may be done to a layer under a budget.

    Attributes:
        name: the word for it, for example `2of4-int4-64`.
        selection, quantization: what it stands for.
    """

    name: str
    selection: Selection | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Budget:
    """A limit for the whole model, under which each input group of layers takes one of the choices (`method.budget`).

    Attributes:
        kind: what is limited: `size_bytes` or `ratio` of the export (to the dense model's bytes), `bits_per_weight` of
            the layers, or `decode_speed_ratio`, where the limit is how many times fewer bytes a token reads.
        limit: the number.
        choices: to choose from.
        samples: calibration samples that tell what the layers' errors do to the output.
    """

    kind: str
    limit: float
    choices: tuple[Choice, ...]
    samples: int


@dataclass(frozen=True)
class Healing:
    """How the weights that are left are taught to answer as the dense model does (`method.healing`).

    Attributes:
        tokens, minutes: the budget; what is used up first ends it.
        batch: samples of a step.
        learning_rate: the highest of the cycle.
        held_out: samples that are not learnt from, on which the best weights are found.
        seed: of the order of the samples.
    """

    tokens: int
    minutes: float
    batch: int
    learning_rate: float
    held_out: int
    seed: int
