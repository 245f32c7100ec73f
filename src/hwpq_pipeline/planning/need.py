"""What one stage takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What one stage takes, planned.

    Attributes:
        stage: its name.
        variant: that it works on; None where all variants share it.
        memory: its peak, bytes.
        gpu: peak bytes on the GPU; 0 without one.
        disk: bytes that stay.
        working: bytes of temporary files besides.
        read: bytes that it reads.
        seconds: on this machine; None where its speed was not measured.
        remedy: what to change where the memory is too much.
    """

    stage: str
    variant: str | None
    memory: int
    gpu: int
    disk: int
    working: int
    read: int
    seconds: float | None = None
    remedy: str = ""

    @property
    def name(self) -> str:
        """For people: `compress of 2of4-int4`."""
        return self.stage if self.variant is None else f"{self.stage} of {self.variant}"
