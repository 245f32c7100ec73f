"""What is known of the inputs that a group's layers share: their Gram matrix and its diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.errors import HwpqError

AGAIN = "The statistics are damaged: run the calibrate pipeline again."


class InputSums(Protocol):
    """What is known of one group's inputs."""

    def gram(self) -> Tensor | None:
        """Σ x xᵀ, shape (in_features, in_features), float32; None where it is not known."""

    def energy(self) -> Tensor:
        """Its diagonal (the inputs' second moments), shape (in_features,), float32."""

    @property
    def seldom(self) -> bool:
        """Whether some tokens reached the layers, but fewer than all, and fewer than they have inputs."""


@dataclass(frozen=True)
class StoredSums:
    """A group's sums in the statistics, read when they are asked for; the matrix once for all steps."""

    statistics: Statistics
    group: str  # or one of its layers

    @property
    def seldom(self) -> bool:
        """As `InputSums.seldom`."""
        tokens, features = self.statistics.tokens_of(self.group), self.statistics.features_of(self.group)
        return 0 < tokens < min(features, self.statistics.tokens)

    def gram(self) -> Tensor | None:
        """Σ x xᵀ; None where only its diagonal was collected.

        Raises:
            HwpqError: it is no sum of x xᵀ.
        """
        return None if self.statistics.mode == "diagonal" else self._matrix

    @cached_property
    def _matrix(self) -> Tensor:
        found = self.statistics.gram(self.group)
        self._check_squares(found.diagonal())
        if not torch.equal(found, found.T):  # written exactly symmetric; NaN equals nothing
            raise HwpqError("the Gram matrix is NaN or not symmetric", where=self.group, remedy=AGAIN)
        return found

    def energy(self) -> Tensor:
        """Its diagonal.

        Raises:
            HwpqError: it is no sum of squares.
        """
        found = self.statistics.energy(self.group)
        self._check_squares(found)
        return found

    def _check_squares(self, sums: Tensor) -> None:
        if not bool((torch.isfinite(sums) & (sums >= 0)).all()):
            raise HwpqError(
                "the sums of its inputs' squares hold values that are NaN, infinite or negative",
                where=self.group,
                remedy=AGAIN,
            )
