"""Nodes that write what users deploy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.export.formats import further_formats
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.parameters import Calibration, Export


def export_variant(
    model: Path,
    corpus: Path,
    compressed: Path,
    name: str,
    description: str,
    calibration: Calibration,
    scratch: Path,
) -> tuple[Path, Measured]:
    """The checkpoint with its model card, and what that took."""
    measuring = Measuring("export")
    card = _card(model, corpus, compressed, name, description, calibration)
    target = export_checkpoint(model, compressed, scratch / "export", card=card)
    return target, measuring.end(target)


def export_formats(
    model: Path,
    corpus: Path,
    compressed: Path,
    name: str,
    description: str,
    calibration: Calibration,
    export: Export,
    scratch: Path,
) -> tuple[Path, Measured]:
    """A directory with a directory for each further format that can hold the variant, each with its model card.

    With it what that took; nothing where there is none.
    """
    measuring = Measuring("formats")
    target = scratch / "formats"
    target.mkdir()
    card = _card(model, corpus, compressed, name, description, calibration)
    known, made = further_formats(), CompressedModel(compressed)
    for word in export.formats:
        if said := known[word].refusal_of(made):
            logging.getLogger(__name__).info("no %s export of %s: %s", word, name, said)
            continue
        command = f"# with export.formats: [{word}] in conf/base/parameters.yml\n{card.command}"
        known[word].write(model, compressed, target / word, card=replace(card, command=command))
    return target, measuring.end(target) if any(target.iterdir()) else {}


def _card(
    model: Path, corpus: Path, compressed: Path, name: str, description: str, calibration: Calibration
) -> CardInfo:
    """What the cards say; of the method, what made the compressed model, since the configuration may have changed."""
    source, text, made = (
        read_json(model / "source.json"),
        read_json(corpus / "source.json"),
        CompressedModel(compressed),
    )
    recipe = Recipe.from_json(made.recipe)
    drawn = {"text": text["name"], **calibration.model_dump(include={"samples", "length", "seed"})}
    return CardInfo(
        variant=name,
        description=description,
        base_model=source["name"],
        license=source.get("license"),
        grid=made.grid,
        structure=made.structure,
        embeddings=recipe.embeddings,
        others=tuple(dict.fromkeys(grid for grid, _ in made.formats if grid != made.grid)),
        partly=bool(recipe.overrides),
        healed_tokens=None if recipe.healing is None else recipe.healing.tokens,
        parameters=recipe.told(),
        calibration=drawn if recipe.needs_text else {},
        command=f"dvc repro export@{name}",
    )
