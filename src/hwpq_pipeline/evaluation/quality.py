"""Quality of an export beside the dense model, on the same tokens.

    perplexity      exp of the mean negative log-likelihood of the true next token, over all samples
    KL divergence   mean over positions of KL(dense ‖ variant) between next-token distributions, nats
    top-1 agreement share of positions where both models find the same token likeliest

A sample of `length` tokens gives `length − 1` predictions. Softmax is float32, sums are float64. The export is loaded
as a user loads it (`loading`), so FP8 and INT8 exports round their activations here as they do when deployed.

On a cluster (`execution.engines`) each worker takes some of the samples: none of them depends on another.

Cost: one forward pass of the body over all tokens, and one product with the head. The dense model's answer is read from
disk (`reference`). That answer holds for an export with the dense model's head alone, so where the head was rounded too
the dense model runs again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.reader import Checkpoint, read_tensors
from hwpq_pipeline.decoder.dtypes import dtype_name
from hwpq_pipeline.decoder.head import Head, plain_head
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.execution.engines import current
from hwpq_pipeline.progress import Progress, no_progress

from .loading import evaluation_dtype, open_blockwise, run_blockwise
from .reference import (
    Reference,
    check_tokens,
    chunks,
    load_reference,
    make_reference,
    perplexity,
    predicting,
)

__all__ = ["Quality", "Reference", "evaluate_export", "load_reference", "make_reference"]

#: Negative log-likelihood, divergence and agreement, shape (samples, length − 1) each.
Answers = tuple[Tensor, Tensor, Tensor]
_ANSWERS = ("nll", "divergence", "agree")
#: Rounding leaves the divergence of a model from itself at ±1e-6. A lower value means a reference of another model.
_KL_FLOOR = -1e-3


@dataclass(frozen=True)
class Quality:
    """What `evaluate_export` found.

    Attributes:
        perplexity: of the export.
        perplexity_ratio: to the dense model's.
        dense_perplexity: of the dense model on the same tokens.
        kl_divergence: KL(dense ‖ export), nats a token, not below 0.
        top1_agreement: 0 to 1.
        tokens: number of predictions.
        nll: mean negative log-likelihood of each sample, nats a token.
        seconds: the evaluation took, loading included.
    """

    perplexity: float
    perplexity_ratio: float
    dense_perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    nll: tuple[float, ...]
    seconds: float

    def figures(self) -> dict[str, float]:
        """What `metrics.json` holds of it, by name."""
        return {name: value for name, value in asdict(self).items() if name not in ("tokens", "nll", "seconds")}


def evaluate_export(
    export_dir: str | Path,
    reference: Reference,
    token_ids: Tensor | np.ndarray | None = None,
    *,
    model_dir: str | Path | None = None,
    batch: int = 1,
    dtype: str = "float32",
    progress: Progress = no_progress,
    work: Path | None = None,
) -> Quality:
    """Evaluate an export against the dense model's answer.

    Args:
        export_dir: a checkpoint that `from_pretrained` loads.
        reference: from `make_reference` or `load_reference`.
        token_ids: (samples, length) integers, which must be the reference's; None takes those.
        model_dir: the dense checkpoint. It runs again where the export's head was rounded.
        batch: samples in a forward pass; 1 is fastest on a CPU, whose caches hold the activations of one.
        dtype: `float32`, `bfloat16` or `auto`; the same as the reference's.
        progress: called with (blocks done, blocks).
        work: a folder of this evaluation's own, from which a killed one goes on; None for nowhere. Workers need it.

    Raises:
        HwpqError: a corrupt export, a head, tokens or a dtype that are not the reference's, or logits that are not
            finite.
    """
    begun = time.perf_counter()
    _check_same(reference, reference.tokens if token_ids is None else check_tokens(token_ids), dtype)
    judge = partial(_judged, Path(export_dir), model_dir, batch=batch, dtype=dtype)
    engine = current()
    if engine.workers == 1 or reference.source is None or work is None:
        nll, divergence, agree = judge(reference, progress=progress, work=work)
    else:
        parts, size = Parts(work / "parts"), len(reference.tokens)
        step = batch * -(-size // (batch * engine.workers))
        shares = [(start, min(start + step, size)) for start in range(0, size, step)]
        on_worker = partial(_judge_share, judge, reference.source, parts)
        for done, _ in enumerate(engine.map(on_worker, shares), start=1):
            progress(done, len(shares))
        nll, divergence, agree = _joined(parts, shares)
    if not bool(torch.isfinite(nll).all() & torch.isfinite(divergence).all()):
        raise HwpqError(
            "logits are NaN or infinite",
            where=str(export_dir),
            remedy="The weights are damaged or overflow; compress the model again.",
        )
    return _summary(reference, nll, divergence, agree, begun, str(export_dir))


def _judge_share(judge: Callable[..., Answers], source: Path, parts: Parts, share: tuple[int, int]) -> None:
    """On a worker: judge the samples from the first number to before the second, and write what is found as a part."""
    name = _part_of(share)
    if not parts.is_whole(name):
        some = load_reference(source).of_samples(slice(*share))
        states = parts.folder / f"states-{name}"
        parts.keep(name, dict(zip(_ANSWERS, judge(some, work=states), strict=True)), {})
        shutil.rmtree(states, ignore_errors=True)


def _part_of(share: tuple[int, int]) -> str:
    return "{}-{}".format(*share)  # both: another number of workers shares out otherwise


def _joined(parts: Parts, shares: Iterable[tuple[int, int]]) -> Answers:
    read = [read_tensors(parts.tensors(_part_of(share))) for share in shares]
    nll, divergence, agree = (torch.cat([tensors[name] for tensors in read]) for name in _ANSWERS)
    return nll, divergence, agree


def _judged(
    export_dir: Path,
    model_dir: str | Path | None,
    reference: Reference,
    *,
    batch: int,
    dtype: str,
    progress: Progress = no_progress,
    work: Path | None,
) -> Answers:
    """Take a reference's samples through the export, and compare; see `_compare_all`."""
    tokens = reference.tokens
    opened = [open_blockwise(export_dir, dtype, tokens)]
    if model_dir is not None and _has_rounded_head(opened[0].model, export_dir):
        opened.append(open_blockwise(model_dir, dtype, tokens))
    _check_head(reference, plain_head(opened[-1].model, str(export_dir)).digest(), reference.linear, str(export_dir))
    ours, *others = (
        run_blockwise(blockwise, tokens, batch, progress, None if work is None else Milestones(work / name))
        for blockwise, name in zip(opened, ("export", "dense"), strict=False)
    )
    judged = _Judged(*ours, *(others[0] if others else (None, None)))
    dense_head = judged.dense_head or judged.head
    _check_head(reference, reference.head_digest, dense_head.linear, str(export_dir))
    return _compare_all(judged, reference, batch)


@dataclass(frozen=True)
class _Judged:
    """A model's head and the final hidden states of each batch; the dense model's too where its head is another."""

    head: Head
    states: Iterator[Tensor]
    dense_head: Head | None
    dense_states: Iterator[Tensor] | None


def _check_head(reference: Reference, digest: str, linear: bool, where: str) -> None:
    if digest != reference.head_digest or linear != reference.linear:
        raise HwpqError(
            "its lm_head is not the dense model's",
            where=where,
            remedy="Export and reference must come from one dense model: run both pipelines again.",
        )


def _check_same(reference: Reference, tokens: Tensor, dtype: str) -> None:
    remedy = "Run the reference pipeline again with these evaluation parameters."
    if not torch.equal(tokens, reference.tokens):
        raise HwpqError("the evaluation tokens are not those of the reference", where="reference", remedy=remedy)
    if (wanted := dtype_name(evaluation_dtype(dtype))) != reference.dtype:
        raise HwpqError(
            f"made in dtype {reference.dtype}, asked for {wanted}",
            where="reference",
            remedy=remedy,
        )


def _has_rounded_head(model: Any, export_dir: str | Path) -> bool:
    """Whether the export holds scales of its head, tied or not."""
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names.get(id(model.get_output_embeddings()))}.weight_scale" in Checkpoint(export_dir)


def _compare_all(judged: _Judged, reference: Reference, batch: int) -> Answers:
    """As `_compare`, over all samples: shape (samples, length − 1) each."""
    nll, divergence = torch.empty(reference.nll.shape), torch.empty(reference.nll.shape)
    agree = torch.empty(reference.nll.shape, dtype=torch.bool)
    with torch.inference_mode():
        for rows, hidden in predicting(judged.states, len(reference.tokens), batch):
            others = [part[rows] for part in (reference.tokens[:, 1:], reference.constant, reference.top1)]
            known = reference.expected[rows] if judged.dense_states is None else next(judged.dense_states)[:, :-1]
            parts = [_compare(judged, *part) for part in chunks(hidden, known, *others)]
            for whole, found in zip((nll, divergence, agree), zip(*parts, strict=True), strict=True):
                whole[rows] = torch.cat(found).view(whole[rows].shape)
    return nll, divergence, agree


def _compare(
    judged: _Judged, hidden: Tensor, expected: Tensor, labels: Tensor, constant: Tensor, top1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood, divergence and agreement at some positions, shape (positions,) each.

    `expected` is the reference's, or the dense model's hidden states.
    """
    logits = judged.head.logits(hidden)
    log_sum = logits.logsumexp(-1).double()
    nll = log_sum - logits.gather(-1, labels[:, None])[:, 0].double()
    if judged.dense_head is not None:
        theirs = judged.dense_head.logits(expected)
        log_p = theirs - theirs.logsumexp(-1, keepdim=True)
        p = log_p.exp()
        constant, answer = (p * log_p).sum(-1), (p * logits).sum(-1).double()
    elif judged.head.linear:
        answer = (expected.double() * hidden.double()).sum(-1)
    else:
        answer = (judged.head.logits(expected).softmax(-1) * logits).sum(-1).double()
    return nll, constant.double() - answer + log_sum, logits.argmax(-1) == top1


def _summary(reference: Reference, nll: Tensor, divergence: Tensor, agree: Tensor, begun: float, where: str) -> Quality:
    mean_nll, mean_divergence = float(nll.double().mean()), float(divergence.double().mean())
    if mean_divergence < _KL_FLOOR:
        raise HwpqError(
            f"a divergence of {mean_divergence:.4f}, which cannot be below 0",
            where=where,
            remedy="Reference and export do not belong together: run both pipelines again.",
        )
    return Quality(
        perplexity=perplexity(mean_nll, where),
        perplexity_ratio=perplexity(mean_nll, where) / reference.perplexity,
        kl_divergence=max(mean_divergence, 0.0),
        top1_agreement=float(agree.double().mean()),
        tokens=nll.numel(),
        nll=tuple(nll.double().mean(1).tolist()),
        dense_perplexity=reference.perplexity,
        seconds=time.perf_counter() - begun,
    )
