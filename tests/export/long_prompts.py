"""Llamas whose configs state their rope scaling in every way that hubs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.export.making import HEADS
from tests.tiny import tiny_checkpoint, tiny_config

LENGTH = 4096
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
BIASED = {"attention_bias": True, "mlp_bias": True}
#: Entries of config.json, as hubs have them; none of them is what transformers 5 would write.
STATED: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3, theta beside it": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500_000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear as parameters": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    "biases": {},
    "llama3 and biases": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "a null scaling": {"rope_scaling": None, "rope_theta": 10_000.0},
}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}


def checkpoint(directory: Path, stated: dict[str, Any], *, biased: bool = False) -> Path:
    """A Llama whose config states its rope as given; biases are not zero, as zeros hide that they were lost."""
    config = tiny_config(**HEADS, max_position_embeddings=LENGTH, **(BIASED if biased else {}))
    tiny_checkpoint(directory, config, dtype=torch.bfloat16)
    if biased:
        from safetensors.torch import load_file, save_file

        generator, file = torch.Generator().manual_seed(1), directory / "model.safetensors"
        tensors = load_file(file)
        for name, value in tensors.items():
            if name.endswith(".bias"):
                tensors[name] = torch.randn(value.shape, generator=generator).mul(0.5).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
    file = directory / "config.json"
    plain = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("rope_")}
    file.write_text(json.dumps({**plain, **stated}))
    return directory
