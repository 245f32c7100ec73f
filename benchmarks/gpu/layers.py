"""The shapes, and layers with made-up weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: (out, in) and how often a block has it.
SHAPES = {
    "7b": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "70b": {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1},
    "tiny": {(16, 64): 2, (24, 64): 1},
}
BLOCKS = {"7b": 32, "70b": 80, "tiny": 1}
TOKENS = {"7b": 16384, "70b": 16384, "tiny": 256}


@dataclass(frozen=True)
class Layer:
    """Attributes: weight (out, in) bfloat16, energy (in,) float32."""

    weight: Tensor
    energy: Tensor

    @property
    def name(self) -> str:
        """As in the other benchmarks."""
        return f"{self.weight.shape[0]}x{self.weight.shape[1]}"


def make_layer(shape: tuple[int, int], device: torch.device, seed: int = 0) -> Layer:
    """Normal weights; energies over three decades."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    return Layer(weight, 10 ** (3 * torch.rand(shape[1], generator=generator, device=device)))


def make_inputs(tokens: int, features: int, device: torch.device, seed: int = 1) -> Tensor:
    """(tokens, features) bfloat16: a fast falling spectrum in a random basis, noise, and some inputs that stand out.

    So that inputs are correlated, as those of a language model are; else there would be nothing to recover.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rank = max(4, features // 4)
    basis = torch.randn(rank, features, device=device, generator=generator) / rank**0.5
    spectrum = 4.0 / torch.arange(1, rank + 1, device=device).sqrt()
    hidden = torch.randn(tokens, rank, device=device, generator=generator) * spectrum
    inputs = hidden @ basis + 0.3 * torch.randn(tokens, features, device=device, generator=generator)
    stands_out = torch.rand(features, device=device, generator=generator) < 0.01
    return (inputs * torch.where(stands_out, 8.0, 1.0)).bfloat16()
