"""What is done to a model, in plain numbers: the recipe.

A variant in the configuration is short: it names a preset and leaves the rest out. A recipe is the same variant with
every number written out, also those that the variant left to a default. It alone decides what the method computes:
steps take a recipe, and the recipe is recorded where the result is (`data/04_recipes`, the export's `recipe.json`,
MLflow, the model card, the report). A section that a variant lacks is None, and so is a number that its section does
not use. A changed default therefore changes the recipes that use it and no others, and DVC computes exactly those
variants again.

It imports neither torch nor pydantic, so that every command may read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from hwpq_pipeline.compression.grids import EMBEDDINGS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.overrides import Override
from hwpq_pipeline.method.presets import (
    CORRECTION_STEPS,
    DAMPING,
    GAIN,
    HEALING,
    PRESETS,
    ROUNDING_SWEEPS,
    SEQUENTIAL_DAMPING,
    Preset,
)
from hwpq_pipeline.method.sections import Healing, Quantization, Recovery, Selection, Sequence


@dataclass(frozen=True)
class Recipe:
    """All that decides what becomes of a model; a section that does not apply is None.

    Attributes:
        selection, recovery, quantization, sequence: for all layers.
        overrides: other sections for some layers (`method.overrides`); the last one that matches counts.
        healing: of the whole model, after the layers.
        embeddings: the grid of the embedding and the head, which are rounded to nearest; None if they stay.
    """

    selection: Selection | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sequence: Sequence | None = None
    overrides: tuple[Override, ...] = ()
    healing: Healing | None = None
    embeddings: str | None = None

    @classmethod
    def from_variant(cls, variant: Mapping[str, Any]) -> Self:
        """The recipe of a variant whose entry is valid (`parameters.Variant`), every number written out.

        Args:
            variant: `selection`, `recovery`, `quantization`, `sequential`, `layers`, `ignore` and `healing`; what is
                missing or None takes its default.

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
            overrides=_overrides(variant, damping),
            healing=_healing(variant.get("healing")),
            embeddings=EMBEDDINGS[(variant.get("quantization") or {}).get("embeddings") or "none"],
        )

    def for_layer(self, layer: str) -> Recipe:
        """What is done to one layer: the recipe with the last override that means it, and without any."""
        sections = next((one.sections for one in reversed(self.overrides) if one.means(layer)), {})
        own = replace(self, overrides=(), healing=None, embeddings=None, **sections)
        return own if own.selection is not None or own.recovery is None else replace(own, recovery=None)

    @property
    def without_search(self) -> Recipe:
        """The recipe for layers that few tokens reached: the mask as it is selected, and rounding to nearest."""
        rounding = self.quantization and Quantization(self.quantization.grid, "nearest", self.quantization.group_size)
        return replace(self, recovery=None, quantization=rounding)

    @property
    def parts(self) -> list[Recipe]:
        """What may be done to a layer: the recipe without overrides, and with each of them."""
        plain = replace(self, overrides=(), healing=None, embeddings=None)
        return [plain, *(replace(plain, **one.sections) for one in self.overrides)]

    @property
    def structure(self) -> str:
        """`2of4`, `unstructured` or `dense`; `unstructured` where layers are pruned in different ways."""
        found = {part.selection.structure for part in self.parts if part.selection is not None}
        return "dense" if not found else found.pop() if len(found) == 1 else "unstructured"

    @property
    def selects(self) -> bool:
        """Whether any layer is pruned."""
        return any(part.selection is not None for part in self.parts)

    @property
    def changes_weights(self) -> bool:
        """Whether anything is done at all."""
        return any(part.selection is not None or part.quantization is not None for part in self.parts)

    @property
    def needs_gram(self) -> bool:
        """Whether whole Gram matrices of the dense model's inputs are used; in sequence the walk sums its own."""
        if self.sequence is not None:
            return False
        return any(
            part.recovery is not None or (part.quantization is not None and part.quantization.sweeps is not None)
            for part in self.parts
        )

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is used at all."""
        return self.selects or self.needs_gram or self.sequence is not None or self.healing is not None

    def to_json(self) -> dict[str, Any]:
        """Plain nested mappings, numbers and words; `from_json` reads them back."""
        sections = {name: getattr(self, name) for name in _KINDS}
        plain: dict[str, Any] = {name: part and asdict(part) for name, part in sections.items()}
        if self.overrides:
            plain["overrides"] = [_plain(override) for override in self.overrides]
        if self.healing is not None:
            plain["healing"] = asdict(self.healing)
        return plain if self.embeddings is None else {**plain, "embeddings": {"grid": self.embeddings}}

    def told(self) -> dict[str, Any]:
        """`to_json` without what does not apply, for people."""
        return {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in self.to_json().items()
            if section is not None and name != "overrides"
        } | ({"overrides": [_plain(one) for one in self.overrides]} if self.overrides else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` gave.

        Raises:
            HwpqError: a section or a number is missing or unknown.
        """
        try:
            if value.keys() - {"overrides", "healing", "embeddings"} != _KINDS.keys():
                raise KeyError(f"sections {', '.join(value)}")
            overrides = tuple(
                Override(
                    tuple(map(str, one["match"])),
                    {name: _section(_KINDS[name], section) for name, section in one.items() if name != "match"},
                )
                for one in value.get("overrides", ())
            )
            sections = {name: _section(kind, value[name]) for name, kind in _KINDS.items()}
            healing, tables = _section(Healing, value.get("healing")), value.get("embeddings")
            return cls(**sections, overrides=overrides, healing=healing, embeddings=tables and str(tables["grid"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise HwpqError(
                f"not a recipe ({error})", where="recipe", remedy="Run the recipes pipeline again."
            ) from error


#: The sections of a recipe.
_KINDS: dict[str, type[Any]] = {
    "selection": Selection,
    "recovery": Recovery,
    "quantization": Quantization,
    "sequence": Sequence,
}


def _plain(override: Override) -> dict[str, Any]:
    sections = {name: None if part is None else asdict(part) for name, part in override.sections.items()}
    return {"match": list(override.match), **sections}


def _overrides(variant: Mapping[str, Any], damping: float) -> tuple[Override, ...]:
    """The variant's `layers` in order, and `ignore` after them."""
    made = {"selection": _selection, "quantization": lambda wanted: _quantization(wanted, damping)}
    found = [
        Override(tuple(entry["match"]), {name: make(entry[name]) for name, make in made.items() if name in entry})
        for entry in variant.get("layers") or ()
    ]
    if ignored := tuple(variant.get("ignore") or ()):
        found.append(Override(ignored, {"selection": None, "quantization": None}))
    return tuple(found)


def _healing(wanted: Mapping[str, Any] | None) -> Healing | None:
    if wanted is None:
        return None
    return replace(HEALING, **{name: value for name, value in wanted.items() if value is not None})


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
