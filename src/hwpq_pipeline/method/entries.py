"""A variant's entry in the configuration, written out as the sections of a recipe (`method.recipe`).

What the entry leaves out takes its default, and a preset's name is replaced by its numbers (`method.presets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hwpq_pipeline.compression.grids import EMBEDDINGS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.choices import sections_of
from hwpq_pipeline.method.overrides import NOTHING, Override
from hwpq_pipeline.method.presets import (
    BUDGET_SAMPLES,
    CORRECTION_STEPS,
    DAMPING,
    GAIN,
    HEALING,
    PRESETS,
    ROUNDING_SWEEPS,
    SEQUENTIAL_DAMPING,
    Preset,
)
from hwpq_pipeline.method.sections import Budget, Choice, Healing, Quantization, Recovery, Selection, Sequence

#: What a budget may limit.
LIMITS = ("size_bytes", "ratio", "bits_per_weight", "decode_speed_ratio")


def sections_of_entry(variant: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's sections by name; see `Recipe.from_variant`."""
    wanted = variant.get("recovery")
    preset = None if wanted is None else _preset(wanted.get("preset") or "fixed_mask")
    sequential = bool(variant.get("sequential") or (preset and preset.sequential))
    damping = (wanted or {}).get("damping")
    if damping is None:
        damping = SEQUENTIAL_DAMPING if sequential else DAMPING
    embeddings = (variant.get("quantization") or variant.get("budget") or {}).get("embeddings")
    return {
        "selection": _selection(variant.get("selection")),
        "recovery": None if wanted is None or preset is None else _recovery(wanted, preset, damping),
        "quantization": _quantization(variant.get("quantization"), damping),
        "sequence": Sequence(CORRECTION_STEPS, damping) if sequential else None,
        "overrides": _overrides(variant, damping),
        "healing": _healing(variant.get("healing")),
        "embeddings": EMBEDDINGS[embeddings or "none"],
        "budget": _budget(variant.get("budget"), damping),
    }


def _overrides(variant: Mapping[str, Any], damping: float) -> tuple[Override, ...]:
    """The variant's `layers` in order, and `ignore` after them."""
    made = {"selection": _selection, "quantization": lambda wanted: _quantization(wanted, damping)}
    found = [
        Override(tuple(entry["match"]), {name: make(entry[name]) for name, make in made.items() if name in entry})
        for entry in variant.get("layers") or ()
    ]
    if ignored := tuple(variant.get("ignore") or ()):
        found.append(Override(ignored, NOTHING))
    return tuple(found)


def _healing(wanted: Mapping[str, Any] | None) -> Healing | None:
    if wanted is None:
        return None
    return replace(HEALING, **{name: value for name, value in wanted.items() if value is not None})


def _budget(wanted: Mapping[str, Any] | None, damping: float) -> Budget | None:
    if wanted is None:
        return None
    kind = next(kind for kind in LIMITS if wanted.get(kind) is not None)
    choices = []
    for word in wanted["choices"]:
        sections = sections_of(word)
        selection, quantization = sections["selection"], sections["quantization"]
        choices.append(Choice(word, _selection(selection), _quantization(quantization, damping)))
    samples = wanted.get("samples")
    return Budget(kind, wanted[kind], tuple(choices), BUDGET_SAMPLES if samples is None else samples)


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
