"""What errors of the layers' outputs do to the model's answer, to second order, from one backward pass.

If the outputs of a layer move by `e` (out), the next-token distribution moves by a Kullback-Leibler divergence of

    KL ≈ ½ eᵀ F e,    F = E[g gᵀ],    g = ∂ log p(y) / ∂output,    y drawn from p

(the Fisher information of the outputs; Martens 2020, arXiv 1412.1193). Of a changed weight the errors are `e = Δw x`.
Rows are taken for independent. Tokens are not averaged. In nats a token a change is predicted to cost

    ½ Σ_t Σ_r (g_tr · (Δw_r x_t))² / tokens.

So errors of different layers can be compared. Their relative size cannot tell. Averages over tokens would not do:
a few tokens have inputs of high energy and gradients of another size (docs/decisions.md, 52). What it leaves out: that
errors of rows, tokens and layers may be correlated, that activations may be rounded too, and what the layers after it
make good.

The walk goes from the last block to the first. Each runs once more on the hidden states that it had, forward and
back, so that memory holds one block's activations, and all blocks' hidden states. Labels are drawn for a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.layers import Layer, find_blocks, layer_map
from hwpq_pipeline.decoder.answers import Answers
from hwpq_pipeline.decoder.blocks import final_hidden, first_output, record_inputs
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.decoder.products import Products
from hwpq_pipeline.decoder.tokens import checked_ids

#: Tokens whose logits exist at a time.
_PIECE = 256
#: By layer, what came through it: inputs (tokens, in) and gradients (tokens, out), float32.
Seen = dict[str, list[tuple[Tensor, Tensor]]]


def output_gradients(
    model_dir: str | Path,
    token_ids: Tensor | np.ndarray[Any, Any],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[tuple[int, Seen]]:
    """Of one decoder block after the other, from the last: its number, and the inputs and gradients of its layers.

    Args:
        model_dir: the dense checkpoint.
        token_ids: (samples, length) calibration tokens; all of them go through a block at once.
        device: where it is computed.
        seed: of the labels.

    Raises:
        HwpqError: token ids out of range, or a model that cannot be used.
    """
    model = load_dense(model_dir, torch.float32, torch.device(device)).requires_grad_(False)
    layers = layer_map(model_dir)
    answers = Answers.of(model, str(model_dir))
    ids = checked_ids(token_ids, model, str(model_dir)).to(device)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _, blocks = find_blocks(model)
    with torch.no_grad():
        (state,), (extra,) = record_inputs(model, blocks, [ids])
        hidden, output = [state], None
        for block, inputs in zip(blocks, extra, strict=True):
            output = inputs.run(block, hidden[-1])
            hidden.append(first_output(output))
    gradient = _top(answers, ids, output, torch.Generator(device=device).manual_seed(seed))
    for number in reversed(range(len(blocks))):
        seen: Seen = {}

        def keep(met: tuple[Layer, ...], x: Tensor, found: Tensor, seen: Seen = seen) -> None:
            parts = found.detach().flatten(0, -2).split([layer.shape[0] for layer in met], dim=1)
            for layer, part in zip(met, parts, strict=True):
                seen.setdefault(layer.name, []).append((x.flatten(0, -2), part))

        state = hidden[number].detach().requires_grad_()
        with torch.enable_grad():
            with Products(layers.in_block(number), parameters, backward=keep):
                output = first_output(extra[number].run(blocks[number], state))
            (gradient,) = torch.autograd.grad(output, state, gradient)
        yield number, seen


def _top(answers: Answers, ids: Tensor, output: Any, generator: torch.Generator) -> Tensor:
    """The gradient of −Σ log p(y) at the last block's hidden states, y drawn for every token."""
    state = first_output(output).detach().requires_grad_()
    _, blocks = find_blocks(answers.model)
    with torch.enable_grad():
        last = final_hidden(answers.model, blocks, ids, (state, *output[1:]) if isinstance(output, tuple) else state)
        rows = last.detach().float().flatten(0, -2)
        found = torch.empty_like(rows)
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE].clone().requires_grad_()
            logs = answers.head.logits(piece).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            (found[start : start + _PIECE],) = torch.autograd.grad(-logs.gather(-1, drawn).sum(), piece)
        (gradient,) = torch.autograd.grad(last, state, found.view(last.shape).to(last.dtype))
    return gradient
