"""The method's numbers: what presets stand for, and what is taken where a variant says nothing. Their one home.

**Presets** of the recovery (weight update after pruning). `fixed_mask` keeps the selected mask and solves for the
weights by conjugate gradients. The others search the mask too: by rounds in which the dropped weights fade, then
sweeps in which they are gone (`compression.refinement`). More rounds or sweeps gained little for their seconds
(docs/decisions.md, 10 and 35).

**Damping** is added to the diagonal of the Gram matrix, in units of its mean. It is small where a layer answers for
itself, and 0.3 where a layer also makes up for the layers before it (docs/decisions.md, 32).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwpq_pipeline.method.sections import Healing


@dataclass(frozen=True)
class Preset:
    """What a recovery preset stands for.

    Attributes:
        method: `fixed_mask`, or the mask search `descent` or `admm`.
        steps: conjugate-gradient steps, of `fixed_mask`.
        rounds: sweeps in which what goes is halved, or ADMM's rounds.
        sweeps: sweeps after them, in which what goes is gone.
        sequential: whether it compresses the layers in sequence.
    """

    method: str
    steps: int | None = None
    rounds: int | None = None
    sweeps: int | None = None
    sequential: bool = False


PRESETS: dict[str, Preset] = {
    "fixed_mask": Preset("fixed_mask", steps=5),
    "fast": Preset("descent", rounds=2, sweeps=1),
    "balanced": Preset("descent", rounds=2, sweeps=2),
    "admm": Preset("admm", rounds=10, sweeps=3),
    "quality": Preset("descent", rounds=2, sweeps=1, sequential=True),
}
DAMPING, SEQUENTIAL_DAMPING = 0.01, 0.3
#: Conjugate-gradient steps from the dense weight towards the target that makes up for the layers before.
CORRECTION_STEPS = 8
#: Of the moving average: each step moves mean and deviation by this share of the way (docs/decisions.md, 31).
GAIN = 1 / 128
ROUNDING_SWEEPS = 4
#: What `healing: {}` stands for. Small batches: in twenty minutes many small steps get farther than few large ones.
HEALING = Healing(tokens=122_880, minutes=20, batch=1, learning_rate=3e-4, held_out=8, seed=0)
#: Calibration samples that tell what the layers' errors do to the output, where a budget is shared out.
BUDGET_SAMPLES = 8
