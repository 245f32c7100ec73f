"""What is done to a model, in plain numbers: the recipe.

A variant in the configuration is short: it names a preset and leaves the rest out. A recipe is the same variant with
every number written out, also those that the variant left to a default. It alone decides what the method computes:
steps take a recipe, and the recipe is recorded where the result is (`data/04_recipes`, the export's `recipe.json`,
MLflow, the model card, the report). A section that a variant lacks is None, and so is a number that its section does
not use. A changed default therefore changes the recipes that use it and no others, and DVC computes exactly those
variants again.

This module is the one home of the method's numbers. It imports neither torch nor pydantic, so that every command may
read it.

**Presets** of the recovery (weight update after pruning). `fixed_mask` keeps the selected mask and solves for the
weights by conjugate gradients. The others search the mask too: by rounds in which the dropped weights fade, then
sweeps in which they are gone (`compression.refinement`). More rounds or sweeps gained little for their seconds
(docs/decisions.md, 10 and 35).

**Damping** is added to the diagonal of the Gram matrix, in units of its mean. It is small where a layer answers for
itself, and 0.3 where a layer also makes up for the layers before it (docs/decisions.md, 32).

A preset's *cost* is the number of passes over a layer's quadratic, in steps of conjugate gradients; `planning` turns
it into seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from hwpq_pipeline.errors import HwpqError


@dataclass(frozen=True)
class Preset:
    """What a recovery preset stands for.

    Attributes:
        method: `fixed_mask`, or the mask search `descent` or `admm`.
        cost: passes over the quadratic.
        steps: conjugate-gradient steps, of `fixed_mask`.
        rounds: sweeps in which what goes is halved, or ADMM's rounds.
        sweeps: sweeps after them, in which what goes is gone.
        sequential: whether it compresses the layers in sequence.
    """

    method: str
    cost: int
    steps: int | None = None
    rounds: int | None = None
    sweeps: int | None = None
    sequential: bool = False


PRESETS: dict[str, Preset] = {
    "fixed_mask": Preset("fixed_mask", cost=5, steps=5),
    "fast": Preset("descent", cost=6, rounds=2, sweeps=1),
    "balanced": Preset("descent", cost=8, rounds=2, sweeps=2),
    "admm": Preset("admm", cost=30, rounds=10, sweeps=3),
    "quality": Preset("descent", cost=6, rounds=2, sweeps=1, sequential=True),
}
DAMPING, SEQUENTIAL_DAMPING = 0.01, 0.3
#: Conjugate-gradient steps from the dense weight towards the target that makes up for the layers before.
CORRECTION_STEPS = 8
#: Of the moving average: each step moves mean and deviation by this share of the way (docs/decisions.md, 31).
GAIN = 1 / 128
ROUNDING_SWEEPS, ROUNDING_COST = 4, 2


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
class Recipe:
    """All that decides what becomes of a model; a section that does not apply is None."""

    selection: Selection | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sequence: Sequence | None = None

    @classmethod
    def from_variant(cls, variant: Mapping[str, Any]) -> Self:
        """The recipe of a variant whose entry is valid (`parameters.Variant`), every number written out.

        Args:
            variant: `selection`, `recovery`, `quantization` and `sequential`; what is missing or None takes its
                default.

        Raises:
            HwpqError: an unknown preset.
        """
        wanted = variant.get("recovery")
        preset = None if wanted is None else _preset(wanted.get("preset") or "fixed_mask")
        sequential = bool(variant.get("sequential") or (preset and preset.sequential))
        damping = (wanted or {}).get("damping")
        if damping is None:
            damping = SEQUENTIAL_DAMPING if sequential else DAMPING
        return cls(
            selection=_selection(variant.get("selection")),
            recovery=None if wanted is None or preset is None else _recovery(wanted, preset, damping),
            quantization=_quantization(variant.get("quantization"), damping),
            sequence=Sequence(CORRECTION_STEPS, damping) if sequential else None,
        )

    @property
    def structure(self) -> str:
        """`2of4`, `unstructured` or `dense`."""
        return self.selection.structure if self.selection else "dense"

    @property
    def changes_weights(self) -> bool:
        """Whether anything is done at all."""
        return self.selection is not None or self.quantization is not None

    @property
    def needs_gram(self) -> bool:
        """Whether whole Gram matrices of the dense model's inputs are used; in sequence the walk sums its own."""
        if self.sequence is not None:
            return False
        return self.recovery is not None or (self.quantization is not None and self.quantization.sweeps is not None)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is used at all."""
        return self.selection is not None or self.needs_gram or self.sequence is not None

    def to_json(self) -> dict[str, Any]:
        """Plain nested mappings, numbers and words; `from_json` reads them back."""
        return asdict(self)

    def told(self) -> dict[str, Any]:
        """`to_json` without what does not apply, for people."""
        return {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in self.to_json().items()
            if section is not None
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` gave.

        Raises:
            HwpqError: a section or a number is missing or unknown.
        """
        kinds = {"selection": Selection, "recovery": Recovery, "quantization": Quantization, "sequence": Sequence}
        try:
            if value.keys() != kinds.keys():
                raise KeyError(f"sections {', '.join(value)}")
            return cls(**{name: _section(kind, value[name]) for name, kind in kinds.items()})
        except (AttributeError, KeyError, TypeError) as error:
            raise HwpqError(
                f"not a recipe ({error})", where="recipe", remedy="Run the recipes pipeline again."
            ) from error


def _section(kind: type[Any], value: Mapping[str, Any] | None) -> Any:
    if value is None:
        return None
    if value.keys() != {field.name for field in fields(kind)}:
        raise KeyError(f"{kind.__name__.lower()} of {', '.join(value)}")
    return kind(**value)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise HwpqError(f"unknown preset {name!r}", where="recovery", remedy=f"Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _selection(wanted: Mapping[str, Any] | None) -> Selection | None:
    if wanted is None:
        return None
    structure, metric = wanted["structure"], wanted.get("metric") or "hwpq_weighted"
    if structure == "2of4":
        return Selection(structure, metric)
    alpha, beta = wanted.get("alpha"), wanted.get("beta")
    return Selection(
        structure,
        metric,
        sparsity=wanted.get("sparsity"),
        multiplier=wanted.get("multiplier"),
        domain=wanted.get("domain") or "sqrt",
        alpha=GAIN if alpha is None else alpha,
        beta=GAIN if beta is None else beta,
        scope=wanted.get("scope") or "row",
    )


def _recovery(wanted: Mapping[str, Any], preset: Preset, damping: float) -> Recovery:
    steps = wanted.get("steps")
    return Recovery(
        preset=wanted.get("preset") or "fixed_mask",
        method=preset.method,
        damping=damping,
        steps=preset.steps if steps is None else steps,
        rounds=preset.rounds,
        sweeps=preset.sweeps,
    )


def _quantization(wanted: Mapping[str, Any] | None, damping: float) -> Quantization | None:
    if wanted is None:
        return None
    method = wanted.get("method") or "nearest"
    group_size = wanted.get("group_size")
    if method == "nearest":
        return Quantization(wanted["grid"], method, group_size=group_size)
    sweeps = wanted.get("sweeps")
    return Quantization(
        wanted["grid"],
        method,
        group_size=group_size,
        sweeps=ROUNDING_SWEEPS if sweeps is None else sweeps,
        damping=damping,
    )
