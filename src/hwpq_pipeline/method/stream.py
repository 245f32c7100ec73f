"""Who writes to the residual stream of a decoder block, found by measuring.

The outputs of the layers that are as wide as the stream are fitted to its change over the dense block. If a weighted
sum of them is the change, the layers with a weight are the **writers**. Nothing is taken from names.

Some models (Gemma 2 and 3, OLMo 2, GLM) put a norm between a layer and the stream: it gets `N(o)`, where

    N(o)_j = g_j o_j / rms(o)

So a module that takes a writer's output as it is, and gives something as wide, is tried in the layer's place. What the
stream lacks by then, `δ`, is asked of the layer through the norm, with the dense token's `r = rms(o)` held fixed:

    N(o*) = N(o) + δ      ⇒      o* = o + r δ / g

A gain `g_j` near zero would ask for the impossible where it matters least, so the division is damped:
`g / (g² + ε mean g²)`. The error that counts is in the stream, where a token's `o` is divided by its `r`. So each token
counts with `1/r` (scaled to a mean square of one) in the sums that the layer is compressed with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

#: Tokens on which the writers of the residual stream are found, and how exactly their sum must be its change.
PROBE, FIT = 512, 1e-3
#: Damping of a norm's small gains, in units of the mean square gain.
GAIN_DAMPING = 1e-2


@dataclass
class Norm:
    """A norm between a layer and the stream.

    Attributes:
        gain: `g`, (hidden,), float32.
        module: that computes it.
        squares, tokens: the sum of `1/r²` over the dense model's tokens so far, and their number (`meet`).
    """

    gain: Tensor
    module: nn.Module
    squares: float = 0.0
    tokens: int = 0

    def meet(self, output: Tensor) -> None:
        """Take notice of some tokens' outputs of the layer in the dense model, (samples, length, hidden)."""
        weights = _reciprocal(output)
        self.squares += float(weights.square().mean().double() * weights.numel())
        self.tokens += weights.numel()

    def wanted(self, lacking: Tensor, output: Tensor) -> Tensor:
        """What the layer's output lacks if the stream lacks this, (samples, length, hidden).

        Args:
            lacking: in the stream.
            output: of the layer in the dense model.
        """
        squares = self.gain.square()
        return lacking * _size(output) * (self.gain / (squares + GAIN_DAMPING * squares.mean()))

    def token_weights(self, output: Tensor) -> Tensor:
        """How much each token counts, (samples, length, 1), with a mean square of one over all tokens met.

        Args:
            output: of the layer in the dense model, (samples, length, hidden).
        """
        mean = torch.tensor(self.squares / self.tokens, dtype=torch.float32, device=output.device)
        return _reciprocal(output) / mean.sqrt()


def _size(output: Tensor) -> Tensor:
    """`r` of every token, (samples, length, 1), float32."""
    return output.float().square().mean(-1, keepdim=True).sqrt()


def _reciprocal(output: Tensor) -> Tensor:
    """`1/r` of every token."""
    return _size(output).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()


@dataclass
class Writers:
    """What may write to the stream: outputs in the dense block that are as wide as it.

    Attributes:
        outputs: of layers, by name, (samples, length, hidden).
        norms: modules that took such an output as it is, and what they gave, by the layer's name.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)

    def follow(self, module: nn.Module, given: Tensor, output: Tensor) -> None:
        """Note a module's output if its input is a layer's output as it was."""
        if output.data_ptr() == given.data_ptr():  # a dropout that does nothing
            return
        for name, made in self.outputs.items():
            if name not in self.norms and made.data_ptr() == given.data_ptr() and made.numel() == given.numel():
                self.norms[name] = (module, output)


@dataclass(frozen=True)
class Stream:
    """The writers of a block.

    Attributes:
        weights: of each writer's part of the stream's change, by the layer's name.
        norms: of the writers that a norm follows.
    """

    weights: dict[str, float]
    norms: dict[str, Norm]

    def wanted(self, layer: str, gap: Tensor, output: Tensor) -> Tensor:
        """What a writer's output should make up for, if the stream lacks `gap`, (samples, length, hidden).

        Args:
            layer: the writer.
            gap: what the stream lacks.
            output: of the writer in the dense model.
        """
        lacking = gap / self.weights[layer]
        return self.norms[layer].wanted(lacking, output) if layer in self.norms else lacking


def find_stream(writers: Writers, before: Tensor, after: Tensor) -> Stream:
    """The layers whose outputs, or their norms, make up the change of the residual stream.

    Args:
        writers: what may.
        before, after: the stream (samples, length, hidden) on both sides of the dense block.
    """
    plain = _weights(writers.outputs, before, after)
    if plain or not writers.norms:
        return Stream(plain, {})
    parts = {name: writers.norms[name][1] if name in writers.norms else made for name, made in writers.outputs.items()}
    weights = _weights(parts, before, after)
    norms = {}
    for name in weights.keys() & writers.norms.keys():
        norm = _norm(*writers.norms[name], writers.outputs[name])
        if norm is None:
            return Stream({}, {})
        norms[name] = norm
    return Stream(weights, norms)


def _weights(outputs: dict[str, Tensor], before: Tensor, after: Tensor) -> dict[str, float]:
    """The outputs whose weighted sum is the change, and their weights; nothing if no sum is."""
    if not outputs:
        return {}
    change = _probe(after - before)
    columns = torch.stack([_probe(output) for output in outputs.values()], dim=1)
    weights = torch.linalg.lstsq(columns, change[:, None]).solution[:, 0]
    missed = float((change - columns @ weights).norm() / change.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if missed > FIT:
        return {}
    return {name: float(weight) for name, weight in zip(outputs, weights, strict=True) if abs(weight) > FIT}


def _norm(module: nn.Module, output: Tensor, given: Tensor) -> Norm | None:
    """The module as a norm `N(o)_j = g_j o_j / rms(o)`; None if it is none."""
    gain = module(torch.ones(1, 1, given.shape[-1], dtype=torch.float32, device=given.device)).float().flatten()
    expected, found = _probe(given / _size(given) * gain), _probe(output)
    if float((expected - found).norm()) > 10 * FIT * float(found.norm()):
        return None
    return Norm(gain, module)


def _probe(hidden: Tensor) -> Tensor:
    """(values,) of the first tokens, float64 on the CPU."""
    return hidden.flatten(0, -2)[:PROBE].flatten().double().cpu()
