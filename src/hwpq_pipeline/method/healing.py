"""Healing: with the mask fixed, the weights that are left learn to answer as the dense model does.

Layer-wise recovery makes each layer's output right. What it leaves is the error of the whole: so the loss here is the
one that counts, the mean Kullback-Leibler divergence of the next-token distributions on calibration text,

    L(θ) = mean over tokens of  Σ_v p(v) (log p(v) − log q_θ(v)),     p dense, q_θ compressed

(distillation: Hinton et al., arXiv 1503.02531; after pruning: Muralidharan et al., arXiv 2407.14679). The weights of
the compressed layers learn, and the norms of the decoder blocks, by Adam in one cycle of the learning rate.

**The mask** holds because a weight that is zero in a pruned layer gets no gradient: Adam's step is zero where all its
gradients were. A kept weight that was rounded to zero gets none either, and stays zero.

**A grid.** The model computes with `s · round(w / s)`, and the gradient there is taken for that of `w`
(straight-through, Bengio et al., arXiv 1308.3432). So it is the rounded model that is healed. Scales of integers learn
too (`method.student`), those of 8-bit floats stay. Activations are not rounded here.

**The budget** is in tokens and in minutes, and the cycle ends with the one that ends first. As long as the minutes are
enough, at the pace so far, a seed gives the same weights each time. Where they are not, the cycle is made as short as
they are: the machine's speed decides then, and the log says so. The machine's memory decides too, where it is short.

**Nothing is chosen on what it learns from.** Some samples are held out. The weights that answer best there are kept,
and those are the weights of the beginning if nothing was better.

**Memory.** Logits exist for a few hundred tokens at a time, whatever the vocabulary: the loss and its gradient are
taken piece by piece at the final hidden states. Where Adam's two moments do not fit, the second is factored (Adafactor,
arXiv 1804.04235). Where the activations do not fit, each block computes its own again (Chen et al., arXiv 1604.06174).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import find_blocks
from hwpq_pipeline.decoder.answers import Answers
from hwpq_pipeline.decoder.head import Head
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.decoder.tokens import checked_ids
from hwpq_pipeline.method.healing_state import Clock, State
from hwpq_pipeline.method.sections import Healing
from hwpq_pipeline.method.student import Student

logger = logging.getLogger(__name__)

#: Tokens whose logits exist at a time.
PIECE = 256
#: Of the cycle, the share in which the learning rate rises.
RISE = 0.1
#: The learning rate of the scales' factors, in units of the weights': a weight is some hundredths, a factor is one.
FACTOR_UNIT = 5.0
#: How often in a cycle the held-out samples are asked, and the state is written.
CHECKS = 4
#: The least root mean square that Adafactor takes a tensor for.
_ADAFACTOR_SMALLEST = 1e-3

#: Is told of progress: steps done, all steps, and the loss of the last one.
Report = Callable[[int, int, float], None]


def heal(
    model_dir: str | Path,
    student: Student,
    token_ids: Tensor,
    healing: Healing,
    *,
    state: State,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[float, float]:
    """Let the student learn from the dense model; it holds the best weights afterwards.

    Args:
        model_dir: the dense checkpoint.
        student: the compressed model, its weights and masks.
        token_ids: (samples, length) calibration tokens; the last `healing.held_out` samples are not learnt from.
        healing: budget, learning rate, batch, seed.
        state: where it is written how far this has come; an earlier run's is gone on from.
        report: is told of progress.
        clock: seconds, for the budget in minutes.

    Returns:
        The held-out divergence (nats a token) before and after.

    Raises:
        HwpqError: an unusable model, or token ids that its vocabulary lacks.
    """
    device = student.device
    teacher = Answers.of(load_dense(model_dir, torch.float32, device), str(model_dir))
    pupil = Answers.of(student.model, str(model_dir))
    ids = checked_ids(token_ids, teacher.model, str(model_dir)).to(device)
    learnt, held_out = ids[: -healing.held_out], ids[-healing.held_out :]
    samples = min(len(learnt), -(-healing.tokens // ids.shape[1]))
    steps = max(1, samples // healing.batch)
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(healing.seed))
    if _activations(student, healing.batch * ids.shape[1]) > _free_bytes(device) / 2:
        _compute_again(student.model)
    optimizer = _optimizer(student, healing.learning_rate)
    watch = Clock(clock, 60 * healing.minutes)
    at = state.read(student, optimizer, watch)
    if not at.best:
        at = at.better(0, _divergence(teacher, pupil, held_out, healing.batch), student)
    due, step = at.step, at.step
    watch.begin(step)
    while (share := step / watch.steps(step, steps)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = healing.learning_rate * cycle(share) * group["unit"]
        batch = learnt[order[step * healing.batch : (step + 1) * healing.batch].to(device)]
        loss = _learn(teacher, pupil, student, optimizer, batch)
        step += 1
        report(step, steps, loss)
        if step >= due + max(1, steps // CHECKS) or step == steps:
            due = step
            at = at.better(step, _divergence(teacher, pupil, held_out, healing.batch), student)
            state.write(at, student, optimizer, watch)
    if step < steps:  # the steps since the last look count too
        logger.warning("The healing's minutes ended it after %d of %d steps.", step, steps)
        at = at.better(step, _divergence(teacher, pupil, held_out, healing.batch), student)
    at.restore(student)
    return at.before, at.after


def cycle(share: float) -> float:
    """The learning rate's factor at a share of the budget: up in a line, and down by half a cosine."""
    if share < RISE:
        return (share + 0.01) / (RISE + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (share - RISE) / (1 - RISE)))


def divergence_at(teacher: Head, pupil: Head, wanted: Tensor, given: Tensor) -> tuple[float, Tensor]:
    """The mean divergence and its gradient at the pupil's final hidden states, a piece of the tokens at a time.

    Args:
        teacher, pupil: their heads.
        wanted, given: their final hidden states (…, hidden), float32.

    Returns:
        Nats a token, and the gradient, of the shape of `given`.
    """
    rows, targets = given.detach().flatten(0, -2), wanted.flatten(0, -2)
    gradient, total = torch.empty_like(rows), 0.0
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE].requires_grad_()
        with torch.no_grad():
            target = teacher.logits(targets[start : start + PIECE]).log_softmax(-1)
        found = nn.functional.kl_div(
            pupil.logits(piece).log_softmax(-1), target, reduction="sum", log_target=True
        ) / len(rows)
        (gradient[start : start + PIECE],) = torch.autograd.grad(found, piece)
        total += float(found.detach())
    return total, gradient.view(given.shape)


def _learn(teacher: Answers, pupil: Answers, student: Student, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """One step of Adam; the loss before it."""
    with torch.no_grad():
        wanted = teacher.hidden(ids)
    with torch.enable_grad():
        given = pupil.hidden(ids)
        loss, gradient = divergence_at(teacher.head, pupil.head, wanted, given)
        given.backward(gradient)
    student.take_gradients()
    optimizer.step()
    optimizer.zero_grad()
    student.show_weights()
    return loss


@torch.no_grad()
def _divergence(teacher: Answers, pupil: Answers, ids: Tensor, batch: int) -> float:
    """The mean divergence on held-out samples, nats a token."""
    total = 0.0
    for part in ids.split(batch):
        for wanted, given in zip(teacher.hidden(part), pupil.hidden(part), strict=True):
            for one, other in zip(wanted.split(PIECE), given.split(PIECE), strict=True):
                target, found = teacher.head.logits(one).log_softmax(-1), pupil.head.logits(other).log_softmax(-1)
                total += float(nn.functional.kl_div(found, target, reduction="sum", log_target=True))
    return total / ids.numel()


def _optimizer(student: Student, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, or Adafactor where its moments do not fit beside the gradients and the best weights.

    Adafactor's steps are in units of each tensor's root mean square: `unit` makes them as long as Adam's.
    """
    needed = 4 * sum(master.nbytes for master in student.masters)
    if needed <= _free_bytes(student.device) / 2:
        weights = student.masters[: len(student.masters) - len(student.factors)]
        groups: list[dict[str, Any]] = [{"params": weights, "unit": 1.0}]
        if student.factors:
            groups.append({"params": student.factors, "unit": FACTOR_UNIT})
        return torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    logger.info("Adam's moments do not fit in memory: the second one is factored.")
    groups = [
        {"params": [master], "unit": 1 / max(_ADAFACTOR_SMALLEST, float(master.square().mean().sqrt()))}
        for master in student.masters
    ]
    return torch.optim.Adafactor(groups, lr=learning_rate, eps=(None, _ADAFACTOR_SMALLEST))


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _activations(student: Student, tokens: int) -> float:
    """Bytes that the blocks keep for the gradient, roughly: some four tensors as wide as each layer's input."""
    return 16.0 * tokens * sum(layer.shape[1] for layer in student.layers)


def _compute_again(model: Any) -> None:
    """Keep the hidden states between blocks alone; a block's inside is computed again for its gradient."""
    from torch.utils.checkpoint import checkpoint

    _, blocks = find_blocks(model)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
