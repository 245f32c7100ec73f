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

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.entries import sections_of_entry
from hwpq_pipeline.method.overrides import Override
from hwpq_pipeline.method.sections import Budget, Choice, Healing, Quantization, Recovery, Selection, Sequence


@dataclass(frozen=True)
class Recipe:
    """All that decides what becomes of a model; a section that does not apply is None.

    Attributes:
        selection, recovery, quantization, sequence: for all layers.
        overrides: other sections for some layers (`method.overrides`); the last one that matches counts.
        healing: of the whole model, after the layers.
        embeddings: the grid of the embedding and the head, which are rounded to nearest; None if they stay.
        budget: what the layers have to fit in. What each of them gets is not known before the model is there
            (`with_choices`).
    """

    selection: Selection | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sequence: Sequence | None = None
    overrides: tuple[Override, ...] = ()
    healing: Healing | None = None
    embeddings: str | None = None
    budget: Budget | None = None

    @classmethod
    def from_variant(cls, variant: Mapping[str, Any]) -> Self:
        """The recipe of a variant whose entry is valid (`variant.Variant`), every number written out.

        Args:
            variant: `selection`, `recovery`, `quantization`, `sequential`, `layers`, `ignore`, `budget` and `healing`;
                what is missing or None takes its default.

        Raises:
            HwpqError: an unknown preset or choice.
        """
        return cls(**sections_of_entry(variant))

    def for_layer(self, layer: str) -> Recipe:
        """What is done to one layer: the recipe with the last override that means it, and without any."""
        sections = next((one.sections for one in reversed(self.overrides) if one.means(layer)), {})
        own = replace(self, overrides=(), healing=None, embeddings=None, budget=None, **sections)
        return own if own.selection is not None or own.recovery is None else replace(own, recovery=None)

    def leaves_open(self, layer: str) -> bool:
        """Whether the budget decides on a layer, and none of the overrides does."""
        return self.budget is not None and not any(one.means(layer) for one in self.overrides)

    @property
    def without_search(self) -> Recipe:
        """The recipe for layers that few tokens reached: the mask as it is selected, and rounding to nearest."""
        rounding = self.quantization and Quantization(self.quantization.grid, "nearest", self.quantization.group_size)
        return replace(self, recovery=None, quantization=rounding)

    @property
    def parts(self) -> list[Recipe]:
        """What may be done to a layer: the recipe alone, or each choice of its budget; and each override."""
        plain = replace(self, overrides=(), healing=None, embeddings=None, budget=None)
        others = [replace(plain, **one.sections) for one in self.overrides]
        if self.budget is None:
            return [plain, *others]
        choices = self.budget.choices
        return [*(replace(plain, selection=c.selection, quantization=c.quantization) for c in choices), *others]

    def with_choices(self, chosen: Mapping[str, str]) -> Recipe:
        """The recipe without a budget, which does to each layer what was chosen for it.

        Args:
            chosen: names of the budget's choices, by layer name; the variant's own overrides count more.

        Raises:
            HwpqError: no choice at all, or one that the budget does not have.
        """
        if self.budget is None:
            return self
        if not chosen:
            raise HwpqError("no layer has a choice", where="budget", remedy="Run the select pipeline again.")
        layers: dict[str, list[str]] = {}
        for layer, name in chosen.items():
            layers.setdefault(name, []).append(layer)
        known = {one.name: one for one in self.budget.choices}
        if lost := sorted(layers.keys() - known.keys()):
            raise HwpqError(f"no choice {lost[0]!r}", where="budget", remedy="Run the select pipeline again.")
        made = [
            Override(tuple(names), {"selection": known[name].selection, "quantization": known[name].quantization})
            for name, names in layers.items()
        ]
        return replace(self, budget=None, overrides=(*made, *self.overrides))

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
        if self.budget is not None:  # its trials are taken on them
            return True
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
        if self.budget is not None:
            plain["budget"] = asdict(self.budget)
        return plain if self.embeddings is None else {**plain, "embeddings": {"grid": self.embeddings}}

    def told(self) -> dict[str, Any]:
        """`to_json` without what does not apply, for people."""
        told = {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in self.to_json().items()
            if section is not None and name not in ("overrides", "budget")
        }
        if self.budget is not None:
            choices = [choice.name for choice in self.budget.choices]
            told["budget"] = {self.budget.kind: self.budget.limit, "choices": choices}
        return told | ({"overrides": [_plain(one) for one in self.overrides]} if self.overrides else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` gave.

        Raises:
            HwpqError: a section or a number is missing or unknown.
        """
        try:
            if value.keys() - {"overrides", "healing", "embeddings", "budget"} != _KINDS.keys():
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
            return cls(
                **sections,
                overrides=overrides,
                healing=healing,
                embeddings=tables and str(tables["grid"]),
                budget=_budget(value.get("budget")),
            )
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


def _section(kind: type[Any], value: Mapping[str, Any] | None) -> Any:
    if value is None:
        return None
    if value.keys() != {field.name for field in fields(kind)}:
        raise KeyError(f"{kind.__name__.lower()} of {', '.join(value)}")
    return kind(**value)


def _budget(value: Mapping[str, Any] | None) -> Budget | None:
    if value is None:
        return None
    choices = tuple(
        Choice(one["name"], _section(Selection, one["selection"]), _section(Quantization, one["quantization"]))
        for one in value["choices"]
    )
    return replace(_section(Budget, value), choices=choices)
