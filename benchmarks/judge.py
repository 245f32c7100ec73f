"""The judge of the benchmarks: perplexity, and divergence from the dense model, of a model in memory.

Runs in the peers' environment and in ours, so it needs torch alone, and shares nothing with
`hwpq_pipeline.evaluation`: what the project says of itself is checked here by other code. Everything is float32, sums
over tokens are float64. The dense model's logits are worked out again from its hidden states (18 MB for 16 × 512
tokens, where the logits would be 1.6 GB).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 256


@torch.inference_mode()
def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Final hidden states (samples, length − 1, hidden) at the positions that predict a token of `ids`."""
    return torch.cat([model.model(input_ids=sample[None], use_cache=False)[0][:, :-1] for sample in ids])


@torch.inference_mode()
def judge(model: Any, ids: Tensor, dense_hidden: Tensor, head: Tensor) -> dict[str, float]:
    """Perplexity on `ids` (samples, length), and the mean KL(dense ‖ model) in nats a token.

    Args:
        model: a transformers causal LM without softcap or bias in its head; made float32 here.
        ids: the evaluation tokens.
        dense_hidden: the dense model's `hidden_states` on them.
        head: (vocabulary, hidden) the dense model's head, float32.
    """
    hidden = hidden_states(model.eval().float(), ids)
    own_head = model.lm_head.weight.float()
    if not torch.equal(own_head, head):
        raise SystemExit("the output head was changed: the sides do not compress the same layers")
    loss = divergence = 0.0
    parts = zip(hidden.flatten(0, 1).split(ROWS), dense_hidden.flatten(0, 1).split(ROWS), strict=True)
    for (state, dense), label in zip(parts, ids[:, 1:].flatten().split(ROWS), strict=True):
        log_q, log_p = _log_softmax(state @ head.T), _log_softmax(dense @ head.T)
        loss -= float(log_q.gather(-1, label[:, None]).double().sum())
        divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    count = ids[:, 1:].numel()
    return {"perplexity": math.exp(loss / count), "kl_divergence": divergence / count}


def _log_softmax(logits: Tensor) -> Tensor:
    # torch's own log_softmax sums in float32 on the CPU and is off by 1e-5 over a large vocabulary.
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Names and modules of the linear layers but the head: those that both sides compress."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            yield name, module


def zeros_by_layer(model: Any) -> dict[str, float]:
    """Share of zeros in each linear layer but the head."""
    return {name: float((layer.weight == 0).float().mean()) for name, layer in linears(model)}


def broken_fours(model: Any) -> int:
    """How many aligned fours of the linear layers' columns (the head's apart) hold more than two non-zeros."""
    return sum(int(((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) > 2).sum()) for _, layer in linears(model))
