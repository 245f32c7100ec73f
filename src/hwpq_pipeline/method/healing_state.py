"""How far a healing has come, on disk, so that one that was killed goes on.

One safetensors file holds the masters, the optimizer's moments, the best weights so far and the numbers. It is written
whole or not at all. Its name is the variant's and the digest of all that the result depends on, so the state of another
model, text or setting is never gone on from. It stays until the healed model is in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_tensors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.sections import Healing
from hwpq_pipeline.method.student import Student


class Clock:
    """How many steps there is time for.

    Args:
        now: gives seconds.
        limit: seconds in all.
    """

    def __init__(self, now: Callable[[], float], limit: float) -> None:
        self._now, self._limit, self._begun = now, limit, now()
        self._first, self._since = 0, self._begun

    @property
    def seconds(self) -> float:
        """Seconds that are gone, those of earlier runs included."""
        return self._now() - self._begun

    def begin(self, step: int) -> None:
        """Measure the pace from now on."""
        self._first, self._since = step, self._now()

    def steps(self, done: int, wanted: int) -> float:
        """The wanted steps, or fewer if the time does not last for them at the pace so far; at least those done."""
        if done == self._first:
            return wanted
        pace = (self._now() - self._since) / (done - self._first)
        left = self._limit - self.seconds
        if left >= (wanted - done) * pace:
            return wanted
        return max(done, done + int(left / pace))

    def go_on(self, seconds: float) -> None:
        """Count what an earlier run took."""
        self._begun = self._now() - seconds


@dataclass(frozen=True)
class Progress:
    """Where a healing stands.

    Attributes:
        step: steps that are done.
        before, after: the held-out divergence at the beginning and of the best weights, nats a token.
        best: these weights, one tensor for each of the student's masters.
    """

    step: int = 0
    before: float = float("inf")
    after: float = float("inf")
    best: tuple[Tensor, ...] = ()

    def better(self, step: int, divergence: float, student: Student) -> Progress:
        """After a look at the held-out samples: the student's weights are the best, or the earlier ones stay so."""
        before = divergence if not self.best else self.before
        if divergence < self.after:
            best = tuple(master.detach().clone() for master in student.masters)
            return Progress(step, before, divergence, best)
        return replace(self, step=step, before=before)

    @torch.no_grad()
    def restore(self, student: Student) -> None:
        """Give the student the best weights."""
        for master, best in zip(student.masters, self.best, strict=True):
            master.copy_(best)
        student.show_weights()


class State:
    """The file that a healing goes on from.

    Args:
        folder: where it lies; made when something is written.
        variant: the variant's name.
        key: see `key_of`.
    """

    def __init__(self, folder: Path, variant: str, key: str) -> None:
        self.file = folder / f"{variant}.{key}.safetensors"

    def read(self, student: Student, optimizer: torch.optim.Optimizer, clock: Clock) -> Progress:
        """Where an earlier run stood, its weights and moments put back; the beginning if there is none.

        A damaged file, or that of another kind of optimizer, is as good as none.
        """
        if not self.file.is_file():
            return Progress()
        try:
            held = read_tensors(self.file)
        except HwpqError:
            return Progress()
        if f"optimizer.{type(optimizer).__name__}" not in held:
            return Progress()
        step, seconds, before, after = held["numbers"].tolist()
        with torch.no_grad():
            for index, master in enumerate(student.masters):
                master.copy_(held[f"master.{index}"])
        student.show_weights()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in held.items():
            if name.startswith("moment."):
                _, number, kind = name.split(".", 2)
                moments.setdefault(int(number), {})[kind] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        clock.go_on(seconds)
        best = tuple(held[f"best.{index}"].to(student.device) for index in range(len(student.masters)))
        return Progress(int(step), before, after, best)

    def write(self, at: Progress, student: Student, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        """Write where it stands."""
        numbers = torch.tensor([at.step, clock.seconds, at.before, at.after], dtype=torch.float64)
        moments: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
        parts = {f"moment.{index}.{kind}": part for index, held in moments.items() for kind, part in held.items()}
        write_tensors(
            self.file,
            {"numbers": numbers, f"optimizer.{type(optimizer).__name__}": torch.ones(1)}
            | {f"master.{index}": master for index, master in enumerate(student.masters)}
            | {f"best.{index}": best for index, best in enumerate(at.best)}
            | parts,
        )


def forget_states(folder: Path, variant: str) -> None:
    """Remove a variant's files: its healed model is where it belongs."""
    for file in folder.glob(f"{variant}.*.safetensors*"):  # also one that a killed process had half written
        file.unlink()


def key_of(model_dir: str | Path, student: Student, token_ids: Tensor, healing: Healing) -> str:
    """A digest of all that the healed weights depend on: both models, the tokens, the settings."""
    digest = hashlib.sha256(json.dumps(asdict(healing), sort_keys=True).encode())
    digest.update(sha256_directory(model_dir).encode())
    embedding = student.model.get_input_embeddings().weight  # may be rounded
    for tensor in (*student.masters, embedding, token_ids):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
