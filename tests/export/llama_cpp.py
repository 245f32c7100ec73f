"""What llama.cpp computes from a GGUF file of a Llama, written from its sources and with nothing of the product.

`ggml_rope_ext` turns neighbouring pairs (2i, 2i + 1) by `position · freq_base^(−2i/d) / factor / rope_freqs[i]`. Every
bias is added where the file has one. Weights are dequantized by the gguf package; activations are not rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu


class LlamaCpp:
    """A GGUF file.

    Args:
        directory: with one GGUF file.
    """

    def __init__(self, directory: Path) -> None:
        from gguf import GGUFReader, dequantize

        (file,) = directory.glob("*.gguf")
        reader = GGUFReader(file)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {
            entry.name: torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
            for entry in reader.tensors
        }

    def _linear(self, name: str, x: Tensor) -> Tensor:
        product = x @ self.tensors[f"{name}.weight"].T
        return product + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else product

    def _norm(self, name: str, x: Tensor) -> Tensor:
        epsilon = self.fields["llama.attention.layer_norm_rms_epsilon"]
        return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * self.tensors[f"{name}.weight"]

    def _rope(self, x: Tensor) -> Tensor:
        """(heads, tokens, size), neighbours rotated."""
        size = self.fields["llama.rope.dimension_count"]
        turns = self.fields["llama.rope.freq_base"] ** (-torch.arange(0, size, 2).double() / size)
        turns = turns / self.fields.get("llama.rope.scaling.factor", 1.0)
        turns = turns / self.tensors.get("rope_freqs.weight", torch.ones(size // 2))
        angles = torch.arange(x.shape[1])[:, None] * turns
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:2], size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape).float()

    def logits(self, ids: Tensor) -> Tensor:
        """(length,) ids to (length, vocabulary) logits."""
        heads, keys = (self.fields[f"llama.attention.head_count{end}"] for end in ("", "_kv"))
        x = embedding(ids, self.tensors["token_embd.weight"])
        for block in range(self.fields["llama.block_count"]):
            name = f"blk.{block}"
            normed = self._norm(f"{name}.attn_norm", x)
            q, k, v = (
                self._linear(f"{name}.attn_{part}", normed).view(len(ids), count, -1).transpose(0, 1)
                for part, count in (("q", heads), ("k", keys), ("v", keys))
            )
            k, v = (part.repeat_interleave(heads // keys, dim=0) for part in (self._rope(k), v))
            attended = scaled_dot_product_attention(self._rope(q)[None], k[None], v[None], is_causal=True)[0]
            x = x + self._linear(f"{name}.attn_output", attended.transpose(0, 1).reshape(len(ids), -1))
            normed = self._norm(f"{name}.ffn_norm", x)
            gate, up = (self._linear(f"{name}.ffn_{part}", normed) for part in ("gate", "up"))
            x = x + self._linear(f"{name}.ffn_down", silu(gate) * up)
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self._norm("output_norm", x) @ self.tensors[f"{head}.weight"].T
