"""Node that writes what users deploy."""

from __future__ import annotations

import time
from pathlib import Path

from hwpq_pipeline.checkpoints.reader import read_json
from hwpq_pipeline.export.card import CardInfo
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.parameters import Calibration, Variant


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
    source, text = read_json(model / "source.json"), read_json(corpus / "source.json")
    recovers, descends = variant.recovery, variant.quantization and variant.quantization.method != "nearest"
    calibrated = bool(variant.selection or recovers or descends)
    card = CardInfo(
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
    target = export_checkpoint(model, compressed, scratch / "export", card=card)
    return target, {"export": time.perf_counter() - begun}
