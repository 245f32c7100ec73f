"""What a run's needs depend on besides the model and the variants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """Samples that a stage runs.

    Attributes:
        samples: their number.
        length: tokens of each.
        batch: samples of a forward pass.
        item: bytes of a number of the forward pass.
    """

    samples: int
    length: int
    batch: int
    item: int = 4

    @property
    def count(self) -> int:
        """All tokens."""
        return self.samples * self.length


@dataclass(frozen=True)
class Conditions:
    """A configuration, without its variants.

    Attributes:
        calibration, evaluation: the samples.
        formats: further export formats that are asked for.
        prompts: whether prompts are continued.
        sums_kept: whether the layers' sums stay on disk (`calibration.keep`).
        gpu: whether `calibrate`, `select` and `compress` compute on a GPU.
    """

    calibration: Tokens
    evaluation: Tokens
    formats: tuple[str, ...] = ()
    prompts: bool = False
    sums_kept: bool = True
    gpu: bool = False
