"""Typed, frozen parameters of a variant: what may stand in an entry of `conf/*/parameters_variants.yml`.

As in `parameters`, a wrong key, a value out of range or two values that contradict each other stop a run before it has
written a byte. `method.recipe.Recipe` writes a valid entry out in plain numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_serializer, model_validator

from hwpq_pipeline.compression.grids import EMBEDDINGS, GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.choices import sections_of
from hwpq_pipeline.method.entries import LIMITS
from hwpq_pipeline.method.overrides import problem_of
from hwpq_pipeline.method.presets import PRESETS
from hwpq_pipeline.parameters import Parameters, Seed, one_of

Fraction = Annotated[float, Field(gt=0, lt=1)]
#: Deviations over the mean: no float32 ratio of a row of weights comes near it, so more drops every weight.
MOST_MULTIPLIER = 1e4
#: In units of the Gram matrix's mean energy: with more of it the inputs no longer count.
MOST_DAMPING = 1e3


def _check_pattern(pattern: str) -> str:
    if problem := problem_of(pattern):
        raise ValueError(problem)
    return pattern


#: Of layers' names, in compressed-tensors' syntax.
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class Selection(Parameters):
    """Which weights stay. What is left out takes the default of `method.presets`.

    `2of4` keeps two of every four consecutive inputs. `unstructured` walks the rows with the moving average: with
    `sparsity` the multiplier λ is solved for; with `multiplier` it is given (the paper's mode) and the sparsity
    follows.
    """

    structure: Literal["2of4", "unstructured"]
    metric: Literal["hwpq", "hwpq_weighted", "wanda", "ria", "magnitude"] | None = None
    sparsity: Fraction | None = None
    multiplier: Annotated[float, Field(ge=0, le=MOST_MULTIPLIER)] | None = None
    domain: Literal["sqrt", "log", "raw"] | None = None
    alpha: Fraction | None = None
    beta: Fraction | None = None
    scope: Literal["row", "layer"] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        given = [name for name in ("sparsity", "multiplier") if getattr(self, name) is not None]
        if self.structure == "2of4" and given:
            raise ValueError(f"structure 2of4 fixes the sparsity at one half; remove {' and '.join(given)}")
        if self.structure == "unstructured" and len(given) != 1:
            raise ValueError(
                "structure unstructured needs exactly one of sparsity and multiplier; "
                f"given: {' and '.join(given) or 'neither'}"
            )
        if self.structure == "2of4" and (moved := self.model_fields_set & {"domain", "alpha", "beta", "scope"}):
            raise ValueError(f"{', '.join(sorted(moved))} belong to structure unstructured; remove them")
        return self


class Recovery(Parameters):
    """How the weights that stay make up for those that go (weight update, mask search).

    `preset` names a method with its numbers (`method.presets.PRESETS`; docs/choosing-a-variant.md compares them).
    `fixed_mask`, the default, keeps the selected mask and takes `steps` of conjugate gradients. `damping` is added to
    the diagonal of the Gram matrix, in units of its mean; it holds for the rounding and the sequence too.
    """

    preset: Literal["fixed_mask", "fast", "balanced", "admm", "quality"] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    damping: Annotated[float, Field(ge=0, le=MOST_DAMPING)] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.steps is not None and self.preset is not None and PRESETS[self.preset].steps is None:
            raise ValueError("steps belongs to preset fixed_mask; remove it")
        return self


class Quantization(Parameters):
    """The grid (number format) that the remaining weights are rounded to; `compression.grids` has them.

    A grid with group sizes has a scale for each `group_size` columns of a row, and takes one of these sizes. The others
    have a scale for each output channel. `embeddings` is the grid of the embedding and the head, with a scale a row.
    """

    grid: Annotated[str, one_of(GRIDS)]
    group_size: int | None = None
    method: Literal["nearest", "coordinate_descent"] = "nearest"
    sweeps: Annotated[int, Field(ge=1, le=100)] | None = None
    embeddings: Annotated[str, one_of(EMBEDDINGS)] = "none"

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        grid = GRIDS[self.grid]
        if not grid.group_sizes and self.group_size is not None:
            raise ValueError(f"grid {self.grid} has one scale an output channel; remove group_size")
        if grid.group_sizes and self.group_size not in grid.group_sizes:
            raise ValueError(f"grid {self.grid} needs group_size ({' or '.join(map(str, grid.group_sizes))})")
        if self.method == "coordinate_descent" and not grid.descends:
            descending = ", ".join(name for name in GRIDS if GRIDS[name].descends)
            raise ValueError(f"method coordinate_descent is for {descending}; grid {self.grid} rounds to nearest")
        if self.method == "nearest" and self.sweeps is not None:
            raise ValueError("sweeps belongs to method coordinate_descent; remove it")
        return self


class LayerSettings(Parameters):
    """Other settings for some layers of a variant; a section that is not given stays as the variant has it.

    `match` takes compressed-tensors' patterns: a layer's name, or `re:` and a regular expression. A section of null
    does nothing to these layers.
    """

    match: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    selection: Selection | None = None
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set & {"selection", "quantization"}:
            raise ValueError("nothing is set for these layers; give selection or quantization")
        if self.quantization is not None and EMBEDDINGS[self.quantization.embeddings] is not None:
            raise ValueError("embeddings belong to the variant's own quantization; remove them here")
        return self

    @model_serializer
    def _what_was_given(self) -> dict[str, Any]:
        """The sections that were given: one of null is not the same as none."""
        plain: dict[str, Any] = {"match": self.match}
        for name in sorted(self.model_fields_set & {"selection", "quantization"}):
            part = getattr(self, name)
            plain[name] = None if part is None else part.model_dump()
        return plain


class Healing(Parameters):
    """After the layers: the whole model learns from the dense one, with its mask and its scales (`method.healing`).

    `tokens` and `minutes` are the budget; what is used up first ends it. What is left out takes the default of
    `method.presets.HEALING`.
    """

    tokens: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    held_out: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None


def _check_choice(word: str) -> str:
    try:
        sections_of(word)
    except HwpqError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from error
    return word


class Budget(Parameters):
    """Instead of settings: a limit for the whole model, and what layers may choose from (`method.choices`).

    Exactly one limit is given: `size_bytes` of the export, its `ratio` to the dense model's bytes, `bits_per_weight` of
    the layers with their scales, or `decode_speed_ratio`: how many times fewer bytes a token reads than in the dense
    model. `embeddings` is as in `quantization`. `samples` of the calibration text tell what errors do to the output.
    """

    size_bytes: Annotated[int, Field(ge=1)] | None = None
    ratio: Fraction | None = None
    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    decode_speed_ratio: Annotated[float, Field(ge=1, le=16)] | None = None
    choices: tuple[Annotated[str, AfterValidator(_check_choice)], ...]
    embeddings: Annotated[str, one_of(EMBEDDINGS)] = "none"
    samples: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(LIMITS)}; given: {' and '.join(given) or 'none'}")
        if len(self.choices) < 2:
            raise ValueError("choices needs two words or more")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("a choice stands there twice")
        return self


class Variant(Parameters):
    """One compressed variant: an entry of `conf/base/parameters_variants.yml`. `method.recipe.Recipe` writes it out.

    With `sequential` the layers are compressed in order, each on what the compressed layers before it give and
    towards what the dense model has there, the residual stream included. That is better, and costs two more forward
    passes a variant. Some presets set it.

    `layers` has other settings for some layers, of which the last match counts; `ignore` leaves layers as they are.
    `budget` chooses for each layer what is done. `healing` teaches the compressed model as a whole; `healing: {}` takes
    all defaults.
    """

    description: str
    selection: Selection | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sequential: bool | None = None
    layers: tuple[LayerSettings, ...] = ()
    ignore: tuple[Pattern, ...] = ()
    budget: Budget | None = None
    healing: Healing | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        preset = self.recovery.preset if self.recovery else None
        if self.budget is not None and (self.selection or self.quantization):
            raise ValueError("a budget's choices take the place of selection and quantization; remove these")
        chosen = [sections_of(word) for word in self.budget.choices] if self.budget else []
        selects = self.selection is not None or any(part.selection for part in self.layers)
        selects = selects or any(part["selection"] for part in chosen)
        if self.recovery is not None and not selects:
            raise ValueError("recovery mends what selection prunes; add selection or remove recovery")
        rounds = self.quantization is not None or any(part.quantization for part in self.layers)
        rounds = rounds or any(part["quantization"] for part in chosen)
        if self.healing is not None and not selects and not rounds:
            raise ValueError("healing mends what selection and quantization do; add one or remove healing")
        if self.ignore and not selects and not rounds:
            raise ValueError("nothing is done that ignore could leave out; remove ignore")
        if self.sequential and self.recovery is None and not rounds:
            raise ValueError("sequential corrects what recovery or quantization makes; add one or remove sequential")
        if self.sequential is False and preset is not None and PRESETS[preset].sequential:
            raise ValueError(f"preset {preset} compresses layers in sequence; remove sequential or choose preset fast")
        return self
