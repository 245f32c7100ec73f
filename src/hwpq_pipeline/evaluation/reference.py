"""The dense model's answer on the evaluation tokens, kept so that no variant computes it again.

For a token position let `z = W h + b` be the logits (`W`: the head, (vocabulary, hidden); `h`: the final
hidden state), `p = softmax(z)` the dense model's and `q` a variant's next-token distribution. A variant keeps
the head, so

    KL(p ‖ q) = Σ p log p − Σ p log q
              = Σ p log p − Σ p (W h_q + b) + logsumexp(W h_q + b)
              = c − e · h_q + logsumexp(W h_q + b)        e = Wᵀ p,   c = Σ p log p − p · b

`e` (the expected output embedding) and the number `c` are all that the divergence needs from the dense model. They take
as many bytes as its hidden states. They save half of the work, because the hidden states need not be multiplied by the
head again for every variant, and the head is the largest matrix of a small model. Beside them stand the dense model's
likeliest token and the negative log-likelihood of the true one. A scale of the logits joins `W` and `b`. A head that
caps its logits is not linear (`head`): there the dense model's hidden states are kept in the place of `e`, and its
logits are computed again for every variant.

Products and softmax are float32. Products are as exact as the logits themselves (about 1e-6 of their size), so a
divergence is exact to about 1e-5 nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_tensors
from hwpq_pipeline.decoder.dtypes import dtype_name
from hwpq_pipeline.decoder.head import Head
from hwpq_pipeline.decoder.milestones import Milestones
from hwpq_pipeline.decoder.tokens import token_table
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress

from .loading import evaluation_dtype, open_blockwise, run_blockwise

FILE = "reference.safetensors"
#: A file of its own: safetensors writes metadata in random order, and the same answer should have the same bytes.
FACTS = "reference.json"
#: Rows of logits at a time: 256 × 49,152 float32 are 50 MB.
CHUNK = 256
_REMEDY = "Run the reference pipeline again."


@dataclass(frozen=True)
class Reference:
    """The dense model's answer; `length` tokens a sample give `length − 1` predictions.

    Attributes:
        tokens: (samples, length) int64, the evaluation tokens.
        expected: (samples, length − 1, hidden) float32, `e` above.
        constant: (samples, length − 1) float32, `c` above.
        top1: (samples, length − 1) int64, the likeliest next token.
        nll: (samples, length − 1) float32, −log p of the true next token, nats.
        head_digest: SHA-256 of the head that `expected` was made with.
        dtype: that the dense model ran in.
        linear: whether its head is linear; `expected` holds its hidden states if not.
        source: the directory that it was read from; None if it was made here.
    """

    tokens: Tensor
    expected: Tensor
    constant: Tensor
    top1: Tensor
    nll: Tensor
    head_digest: str
    dtype: str
    linear: bool = True
    source: Path | None = None

    def of_samples(self, rows: slice) -> Reference:
        """The answer to some of the samples."""
        per_sample = ("tokens", "expected", "constant", "top1", "nll")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_sample})

    @property
    def perplexity(self) -> float:
        """The dense model's exp(mean negative log-likelihood)."""
        return perplexity(float(self.nll.double().mean()), "dense model")


def make_reference(
    model_dir: str | Path,
    token_ids: Tensor | np.ndarray,
    target: str | Path,
    *,
    batch: int = 1,
    dtype: str = "float32",
    progress: Progress = no_progress,
    milestones: Milestones | None = None,
) -> Reference:
    """Run the dense model over the evaluation tokens and write its answer to a directory.

    Args:
        model_dir: the dense checkpoint.
        token_ids: (samples, length) integers.
        target: the directory; replaced when the new one is complete.
        batch: samples in a forward pass; 1 is fastest on a CPU, whose caches hold the activations of one.
        dtype: `float32`, `bfloat16` or `auto`.
        progress: called with (blocks done, blocks).
        milestones: where a killed run goes on from; None for nowhere.

    Raises:
        HwpqError: too few tokens, ids outside the vocabulary, a model that does not load, logits that are not
            finite.
    """
    tokens = check_tokens(token_ids)
    head, states = run_blockwise(open_blockwise(model_dir, dtype, tokens), tokens, batch, progress, milestones)
    samples, length = tokens.shape
    expected = torch.empty(samples, length - 1, head.weight.shape[1])
    constant, nll = torch.empty(samples, length - 1), torch.empty(samples, length - 1)
    top1 = torch.empty(samples, length - 1, dtype=torch.int64)
    with torch.inference_mode():
        for rows, hidden in predicting(states, len(tokens), batch):
            labels = tokens[rows, 1:]
            answers = [_answer(head, part, label) for part, label in chunks(hidden, labels)]
            for whole, parts in zip((expected, constant, top1, nll), zip(*answers, strict=True), strict=True):
                whole[rows] = torch.cat(parts).view(whole[rows].shape)
    if not bool(torch.isfinite(constant).all() & torch.isfinite(nll).all()):
        raise HwpqError("logits are NaN or infinite", where=str(model_dir), remedy="Use an undamaged model.")
    tensors = {"tokens": tokens, "expected": expected, "constant": constant, "top1": top1, "nll": nll}
    reference = Reference(
        **tensors,
        head_digest=head.digest(),
        dtype=dtype_name(evaluation_dtype(dtype)),
        linear=head.linear,
        source=None,
    )
    with atomic_directory(target) as partial:
        write_tensors(partial / FILE, tensors)
        facts = {"dtype": reference.dtype, "head_digest": reference.head_digest}
        write_json(partial / FACTS, facts | ({} if reference.linear else {"linear": False}))
    return reference


def load_reference(directory: str | Path) -> Reference:
    """Read what `make_reference` wrote.

    Raises:
        HwpqError: it is missing, corrupt, or no reference.
    """
    tensors, facts = read_tensors(Path(directory) / FILE), read_json(Path(directory) / FACTS)
    try:
        linear = facts.get("linear", True)
        return Reference(
            **tensors, head_digest=facts["head_digest"], dtype=facts["dtype"], linear=linear, source=Path(directory)
        )
    except (KeyError, TypeError) as error:
        raise HwpqError(f"not a reference ({error})", where=str(directory), remedy=_REMEDY) from error


def perplexity(nll: float, where: str) -> float:
    """Perplexity of a mean negative log-likelihood in nats: its exp.

    Raises:
        HwpqError: it is too large for float64, which happens to models whose weights were destroyed.
    """
    if nll > 700:
        raise HwpqError(
            f"a mean negative log-likelihood of {nll:.0f} nats",
            where=where,
            remedy="The model's weights are destroyed: prune or round them less.",
        )
    return math.exp(nll)


def check_tokens(token_ids: Tensor | np.ndarray) -> Tensor:
    """Token ids as an int64 tensor, shape (samples, length).

    Raises:
        HwpqError: not a table of integers, or shorter than two tokens.
    """
    tokens = token_table(token_ids, where="evaluation tokens")
    if tokens.shape[1] < 2:
        raise HwpqError(
            f"samples of {tokens.shape[1]} tokens predict nothing",
            where="evaluation tokens",
            remedy="Use samples of at least 2 tokens; 512 are usual.",
        )
    return tokens


def predicting(states: Iterator[Tensor], samples: int, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each batch and its hidden states at the positions that predict, (rows, length − 1, hidden)."""
    for start in range(0, samples, batch):
        yield slice(start, min(start + batch, samples)), next(states)[:, :-1]


def chunks(hidden: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of `CHUNK` positions: hidden states (positions, hidden), and the same positions of the others."""
    flat = [hidden.flatten(0, 1), *(other.flatten(0, 1) for other in others)]
    yield from zip(*(tensor.split(CHUNK) for tensor in flat), strict=True)


def _answer(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = head.logits(hidden)
    # Not log_softmax: on the CPU its float32 sum over a large vocabulary is off by 1e-5, logsumexp's is not.
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    constant = (p * log_p).sum(-1).double()
    if head.linear and head.bias is not None:
        constant = constant - p.double() @ (head.bias.double() * head.scale)
    nll = -log_p.gather(-1, labels[:, None])[:, 0]
    expected = (p * head.scale) @ head.weight if head.linear else hidden
    return expected, constant.float(), log_p.argmax(-1), nll
