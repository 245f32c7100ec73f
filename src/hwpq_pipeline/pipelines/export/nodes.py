"""Nodes that write what users deploy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hwpq_pipeline.checkpoints.reader import read_json
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.export.gguf import export_gguf
from hwpq_pipeline.export.onnx import export_onnx
from hwpq_pipeline.export.semi_structured import export_semi_structured
from hwpq_pipeline.parameters import Calibration, Export, Variant

#: What the parameter `formats` may name: the writer, and the name of the format on the card.
WRITERS: dict[str, tuple[Callable[..., Path], str]] = {
    "gguf": (export_gguf, "gguf"),
    "gguf-f16": (partial(export_gguf, float16=True), "gguf"),
    "onnx": (export_onnx, "onnx"),
    "semi-structured": (export_semi_structured, "semi-structured"),
}


def export_variant(
    model: Path,
    corpus: Path,
    compressed: Path,
    name: str,
    variant: Variant,
    calibration: Calibration,
    scratch: Path,
) -> tuple[Path, dict[str, float]]:
    """The checkpoint with its model card, and the seconds it took."""
    begun = time.perf_counter()
    card = _card(model, corpus, name, variant, calibration)
    target = export_checkpoint(model, compressed, scratch / "export", card=card)
    return target, {"export": time.perf_counter() - begun}


def export_formats(
    model: Path,
    corpus: Path,
    compressed: Path,
    name: str,
    variant: Variant,
    calibration: Calibration,
    export: Export,
    scratch: Path,
) -> Path:
    """A directory with one directory a further format, each with its model card."""
    target = scratch / "formats"
    target.mkdir()
    card = _card(model, corpus, name, variant, calibration)
    for word in export.formats:
        if word == "semi-structured" and card.structure != "2of4":
            logging.getLogger(__name__).info("%s is not 2:4: no semi-structured export of it", name)
            continue
        write, kind = WRITERS[word]
        command = f"# with export.formats: [{word}] in conf/base/parameters.yml\n{card.command}"
        write(model, compressed, target / word, card=replace(card, format=kind, command=command))
    return target


def _card(model: Path, corpus: Path, name: str, variant: Variant, calibration: Calibration) -> CardInfo:
    source, text = read_json(model / "source.json"), read_json(corpus / "source.json")
    recovers, descends = variant.recovery, variant.quantization and variant.quantization.method != "nearest"
    calibrated = bool(variant.selection or recovers or descends)
    return CardInfo(
        variant=name,
        description=variant.description,
        base_model=source["name"],
        license=source.get("license"),
        grid=variant.quantization.grid if variant.quantization else None,
        structure=variant.selection.structure if variant.selection else "dense",
        parameters=variant.model_dump(exclude={"description"}, exclude_none=True),
        calibration={"text": text["name"], **calibration.model_dump(include={"samples", "length", "seed"})}
        if calibrated
        else {},
        command=f"dvc repro export@{name}",
    )
