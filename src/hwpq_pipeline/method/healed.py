"""A compressed model after healing, written as one: the stage behind `method.healing`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.compressed_writer import CompressedWriter, tensors_of
from hwpq_pipeline.checkpoints.layers import Layer
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.healing import heal
from hwpq_pipeline.method.healing_state import State, key_of
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.student import Student
from hwpq_pipeline.progress import progress_bar

logger = logging.getLogger(__name__)


def samples_needed(recipe: Recipe, length: int) -> int:
    """How many samples of `length` tokens a recipe's healing takes, those held out included; 0 without one."""
    healing = recipe.healing
    return 0 if healing is None else max(healing.batch, -(-healing.tokens // length)) + healing.held_out


def write_healed(
    model: str | Path,
    compressed: str | Path,
    recipe: Recipe,
    target: Path,
    *,
    tokens: np.ndarray[Any, Any] | Tensor,
    states: Path,
    device: torch.device,
) -> None:
    """Heal a compressed model, and write it as the same kind of files.

    Args:
        model: the dense checkpoint.
        compressed: its compressed model.
        recipe: with `healing`.
        target: an existing, empty directory.
        tokens: (samples, length) calibration tokens; as many as `samples_needed` says.
        states: the folder in which it is written how far this has come; a run that was killed goes on from there.
            Once the result is in its place, it is for the caller to empty it.
        device: where it is computed.

    Raises:
        HwpqError: a damaged model, or too few samples.
    """
    healing = recipe.healing
    ids = torch.as_tensor(np.asarray(tokens))
    if healing is None or len(ids) < healing.batch + healing.held_out:
        raise HwpqError(
            f"{len(ids)} samples for a batch and those held out", where="healing", remedy="Give more calibration text."
        )
    held = CompressedModel(compressed)
    student = Student(model, held, device)
    state = State(states, held.variant, key_of(model, student, ids, healing))
    with progress_bar("compress: healing, steps") as bar:

        def report(done: int, total: int, loss: float) -> None:
            bar(done, total)
            logger.debug("step %d of %d: %.4f nats a token", done, total, loss)

        before, after = heal(model, student, ids, healing, state=state, report=report)
    logger.info("Healed on held-out tokens from %.4f to %.4f nats a token.", before, after)
    writer = CompressedWriter(target)
    for layer, made in student.results():
        writer.add(_Healed(layer, made))
    writer.replace(student.norm_weights())
    for table in student.tables:
        writer.embed(table.name, held.read_quantized(table.name, table.shape))
    writer.close(held.variant, held.structure, held.recipe)


@dataclass(frozen=True)
class _Healed:
    """One layer, as `CompressedWriter` takes it."""

    layer: Layer
    made: Tensor | Quantized

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer.name,)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        if isinstance(self.made, Quantized):
            return tensors_of(self.name, self.made)
        return {f"{self.name}.weight": self.made}

    @property
    def grid(self) -> str | None:
        return self.made.grid if isinstance(self.made, Quantized) else None

    @property
    def group_size(self) -> int | None:
        return self.made.group_size if isinstance(self.made, Quantized) else None
