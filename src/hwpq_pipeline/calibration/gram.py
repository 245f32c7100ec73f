"""Summing over tokens: the Gram matrix `G = Σ x xᵀ` of a layer's inputs, or its diagonal.

`G` is symmetric, so half of its products are enough. On the CPU in float32, numpy hands `A.T @ A` to the BLAS
routine for just that (`ssyrk`), which also makes the result exactly symmetric: against a full product on two
AVX2 cores, 1.5 times faster for 1536 features and 1.2 for 576, and faster than any blocking of the upper
triangle out of full products (1.3 at best). Elsewhere (bfloat16, GPU) a full product runs on the matrix
units. Sums are float32 in every case. On a CPU in bfloat16 the product of one batch is rounded to bfloat16
before it is added, a relative error of 2⁻⁹ an entry a batch, which averages out over batches; on a GPU it
is not.
"""

from __future__ import annotations

import numpy as np
import torch


class Gram:
    """Running `Σ x xᵀ`, shape (features, features), float32.

    Args:
        features: length of one input vector.
        device: where the sum is kept.
    """

    suffix = "gram"

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add rows `x`, shape (tokens, features)."""
        if x.device.type == "cpu" and x.dtype == torch.float32:
            rows = x.numpy()
            total = self.sum.numpy()
            with np.errstate(all="ignore"):  # `finite` tells of it, with the layer's name
                np.add(total, rows.T @ rows, out=total)
        elif x.device.type == "cuda" and x.dtype != torch.float32:
            self.sum += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            self.sum += torch.mm(x.T, x)

    def result(self) -> torch.Tensor:
        """The sum, symmetric, on the CPU."""
        total = self.sum.cpu()
        return (total + total.T) / 2

    def finite(self) -> bool:
        """Whether every input so far was a number: `G_jj = Σ x_j²` shows any that was not."""
        return bool(torch.isfinite(self.sum.diagonal()).all())


class Energy:
    """Running `Σ x_j²`, shape (features,), float32: the diagonal of `Gram` at a fraction of its cost."""

    suffix = "energy"

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add rows `x`, shape (tokens, features)."""
        self.sum += x.float().square().sum(dim=0)

    def result(self) -> torch.Tensor:
        """The sum, on the CPU."""
        return self.sum.cpu()

    def finite(self) -> bool:
        """Whether every input so far was a number."""
        return bool(torch.isfinite(self.sum).all())


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16"))
