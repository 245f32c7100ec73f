"""The plan of a configuration: what `hwpq plan` prints, what a run is held to, and what the report shows.

`planning` takes shapes, recipes and numbers. Here they are taken from a checkpoint and from the project's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.calibration.keep import Kept, decide
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.decoder.dtypes import resolve_dtype
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.measuring import resident_memory
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.parameters import Calibration, Compute, Evaluation, Export, Prompts
from hwpq_pipeline.planning import Conditions, Need, Tokens, plan_stages
from hwpq_pipeline.planning.rates import measure_rates
from hwpq_pipeline.planning.shapes import read_shapes


def forecast(model: Path, entries: Mapping[str, Any], parameters: Mapping[str, Any], *, timed: bool) -> list[Need]:
    """What each stage of a configuration takes.

    Args:
        model: the dense checkpoint.
        entries: the variants', by name, plain or with their defaults.
        parameters: sections by name, plain: `calibration`, `evaluation`, `export`, `report`, `compute`.
        timed: whether this machine is timed, some seconds; the plan has no seconds else.

    Raises:
        HwpqError: the model cannot be read, or the device or a dtype cannot be had.
    """
    plain = {name: dict(section) for name, section in parameters.items() if isinstance(section, Mapping)}
    calibration = Calibration.model_validate(plain.get("calibration"))
    evaluation = Evaluation.model_validate(plain.get("evaluation"))
    export, compute = Export.model_validate(plain.get("export", {})), Compute.model_validate(plain.get("compute", {}))
    report = Prompts.model_validate(plain.get("report"))
    shapes = read_shapes(model)
    recipes = {name: Recipe.from_variant(entry) for name, entry in entries.items()}
    device = choose_device(compute.device, tf32=compute.tf32, where="plan")
    item = resolve_dtype(calibration.dtype, device, where="calibration.dtype").itemsize
    kept = kept_sums(model, parameters)
    conditions = Conditions(
        calibration=Tokens(calibration.samples, calibration.length, calibration.batch, item),
        evaluation=Tokens(
            evaluation.samples, evaluation.length, evaluation.batch, getattr(torch, evaluation.dtype).itemsize
        ),
        formats=export.formats,
        prompts=bool(report.prompts),
        sums_kept=kept is None or kept.sums,
        gpu=device.type == "cuda",
    )
    rates = measure_rates(model, shapes, recipes.values(), item=item, device=device) if timed else None
    return plan_stages(shapes, recipes, conditions, floor=resident_memory(), rates=rates)


def kept_sums(model: Path, parameters: Mapping[str, Any]) -> Kept | None:
    """What `calibrate` would keep of the layers' sums; None if it makes no matrices.

    Args:
        model: the dense checkpoint, which lies on the disk of the data.
        parameters: sections by name, plain.

    Raises:
        HwpqError: the model cannot be read.
    """
    calibration = Calibration.model_validate(dict(parameters["calibration"]))
    return decide(calibration.keep, layer_map(model), model) if calibration.mode == "gram" else None
