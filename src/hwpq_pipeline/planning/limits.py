"""What this machine has, and what of a plan cannot fit there.

A stage is refused only if its need is above all that the machine has: no other program could make room for it. Where it
is above what is free now, that is told, and the run begins.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.measuring import tree_bytes
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.planning.need import Need

#: Where Linux tells a container's limit, of both versions of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """What there is, bytes.

    Attributes:
        memory: in all, or what this container may take.
        free_memory: now.
        disk: free for data, that which a run replaces included.
        temporary: free in the system's folder for temporary files.
        gpu: of the GPU; None without one.
    """

    memory: int
    free_memory: int
    disk: int
    temporary: int
    gpu: int | None = None


def this_machine(data: Path) -> Machine:
    """What there is for a project whose data lie in a folder, which may be missing yet."""
    import psutil
    import torch

    known = psutil.virtual_memory()
    said = [file.read_text().strip() for file in map(Path, _LIMITS) if file.is_file()]
    limits = [int(text) for text in said if text.isdigit()]  # `max` is no limit
    place = next(folder for folder in (data, *data.resolve().parents) if folder.is_dir())
    return Machine(
        memory=min([known.total, *limits]),
        free_memory=min([known.available, *limits]),
        disk=shutil.disk_usage(place).free + tree_bytes(data),
        temporary=shutil.disk_usage(tempfile.gettempdir()).free,
        gpu=torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
    )


def too_large(needs: Sequence[Need], machine: Machine) -> list[HwpqError]:
    """Why these stages cannot run here, a line each; none if they can."""
    found = []
    for need in needs:
        if need.memory > machine.memory:
            found.append(_refusal(need, "memory", need.memory, machine.memory, _less_memory(need)))
        if machine.gpu is not None and need.gpu > machine.gpu:
            found.append(_refusal(need, "GPU memory", need.gpu, machine.gpu, "Set compute.device to cpu."))
        # Calibration keeps its working files beside what it writes.
        place, other = (
            (machine.disk, "move the project") if need.stage == "calibrate" else (machine.temporary, "set TMPDIR")
        )
        if need.working > place:
            remedy = f"Take fewer samples, or {other} to a larger disk."
            found.append(_refusal(need, "temporary files", need.working, place, remedy))
    whole = sum(need.disk for need in needs)
    if whole > machine.disk:
        found.append(
            HwpqError(
                f"these stages leave some {whole / 1e9:.1f} GB, and there is place for {machine.disk / 1e9:.1f} GB",
                where="data",
                remedy="Make fewer variants, leave out export.formats, or move the project to a larger disk.",
            )
        )
    return found


def tight(needs: Iterable[Need], machine: Machine) -> list[str]:
    """What will fit only once other programs give memory back, a line each."""
    return [
        f"{need.name} takes some {need.memory / 1e9:.1f} GB of memory, and {machine.free_memory / 1e9:.1f} GB are free"
        for need in needs
        if machine.free_memory < need.memory <= machine.memory
    ]


def _refusal(need: Need, what: str, wanted: int, there: int, remedy: str) -> HwpqError:
    said = f"it takes some {wanted / 1e9:.1f} GB of {what}, and there are {there / 1e9:.1f} GB"
    return HwpqError(said, where=need.name, remedy=remedy)


def _less_memory(need: Need) -> str:
    """What to change, by what makes the stage large."""
    if need.stage == "prompts":
        return "Leave report.prompts empty, or use a machine with more memory."
    if need.stage == "formats":
        return "Leave export.formats empty, or use a machine with more memory."
    return need.remedy or "Use a machine with more memory, or a smaller model."


def remedy_of(recipe: Recipe | None) -> str:
    """What in a variant to leave out where it takes too much memory; empty if nothing holds the whole model."""
    if recipe is None:
        return "Lower the stage's batch or length in conf/base/parameters.yml, or use a machine with more memory."
    if recipe.healing is not None:
        return "Leave out its healing, or use a machine with more memory."
    if recipe.budget is not None:
        return "Leave out its budget, or use a machine with more memory."
    return "Take fewer calibration samples, or use a machine with more memory." if recipe.sequence else ""
