"""The rows of the contest: which task, method and settings, for both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peers.tasks import BITS
from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype

TASKS = ("2of4", "50", "int4", "int3", "int2", "2of4-int4", "fp8", "seven")
TUNERS = ("autoround", "autoround-light")
#: Largest first: the samples of a smaller run are the first ones of a larger.
SAMPLES = (32, 8, 128)
LENGTH, SEED, EVALUATION_SAMPLES = 512, 0, 16
#: Of the forward passes, on both sides.
NATIVE = dtype_name(resolve_dtype("auto", torch.device("cpu")))


@dataclass(frozen=True)
class Job:
    """A row to make; the settings below `samples` are the peers'."""

    task: str
    method: str
    side: str
    dtype: str
    samples: int
    propagate_error: bool = True
    observer: str = "memoryless-minmax"
    actorder: str | None = "static"

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this row from others of the same method."""
        if self.side == "ours" or self.method in TUNERS:
            return {}
        if self.method == "nearest":
            return {"observer": self.observer} if self.task in BITS else {}
        rounds = self.method.endswith("gptq")
        extra = {"observer": self.observer, "actorder": self.actorder} if rounds else {}
        return {"propagate_error": self.propagate_error, **extra}


def jobs_of(task: str, samples: int) -> list[Job]:
    """The rows of a task, peer and ours in turn."""
    if task == "seven":
        return [Job(task, "hwpq", "ours", NATIVE, samples)] if samples == 32 else []
    ours = [Job(task, method, "ours", NATIVE, samples) for method in _our_methods(task)]
    peers = _peer_jobs(task, samples)
    if samples != 32:
        ours = [job for job in ours if job.method not in ("hwpq-fixed_mask", "hwpq-balanced", "hwpq-admm")]
    # bfloat16 that is emulated takes several times as long: there, 8 samples show what it gives.
    if samples == (32 if NATIVE == "bfloat16" else 8):
        other = "float32" if NATIVE == "bfloat16" else "bfloat16"
        best = {"sparsegpt": Job.observer, "wanda": Job.observer, "gptq": "mse", "sparsegpt-gptq": "mse"}
        peers += [
            replace(job, dtype=other)
            for job in peers
            if (job.observer, job.propagate_error, job.actorder) == (best.get(job.method), True, Job.actorder)
        ]
    turns = [job for pair in zip(peers, ours, strict=False) for job in pair]
    return turns + peers[len(ours) :] + ours[len(peers) :]


def _our_methods(task: str) -> tuple[str, ...]:
    return {
        "2of4": ("hwpq-fast", "hwpq-quality", "hwpq-balanced", "hwpq-admm", "hwpq-fixed_mask"),
        "50": ("hwpq-fast", "hwpq-quality", "hwpq-balanced", "hwpq-admm", "hwpq-fixed_mask"),
        "int4": ("hwpq", "hwpq-sequential", "nearest"),
        "int3": ("hwpq-sequential", "hwpq-budget", "hwpq"),
        "int2": ("hwpq-sequential", "hwpq-budget"),
        "2of4-int4": ("hwpq-fast", "hwpq-quality", "hwpq-balanced", "hwpq-admm"),
        "fp8": ("nearest",),
    }[task]


def _peer_jobs(task: str, samples: int) -> list[Job]:
    def peer(method: str, **settings: Any) -> Job:
        return Job(task, method, "peer", NATIVE, samples, **settings)

    if task in ("2of4", "50"):
        return [
            peer("sparsegpt"),
            peer("wanda"),
            peer("sparsegpt", propagate_error=False),
            peer("wanda", propagate_error=False),
        ]
    if task == "int4":
        return [
            peer("gptq"),
            peer("nearest"),
            peer("gptq", observer="mse"),
            peer("nearest", observer="memoryless-mse"),
            peer("gptq", observer="mse", propagate_error=False),
            peer("gptq", observer="mse", actorder="weight"),
            *(peer(method) for method in TUNERS),
        ][: None if samples == 32 else 3]
    if task in ("int3", "int2"):
        return [peer("gptq", observer="mse"), peer("autoround-light")]
    if task == "2of4-int4":
        return [peer("sparsegpt-gptq", observer="mse")]
    return [peer("nearest")]
