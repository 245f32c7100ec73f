"""The buffers that no checkpoint holds, because transformers computes them: rotary tables, scales of embeddings."""

from __future__ import annotations

from typing import Any

import torch

#: transformers' mark on tensors that its `initialize_weights` must not touch.
_LOADED = "_is_hf_initialized"


def compute_buffers(model: Any, device: str = "cpu") -> None:
    """Fill them in a model that was built on the meta device, as transformers does after loading.

    Its `initialize_weights` touches nothing that is marked as loaded. A buffer that it leaves out stays NaN.

    Args:
        model: of transformers; its parameters may be there or not.
        device: that the buffers are made on.
    """
    for part in (*model.parameters(), *model.buffers()):
        setattr(part, _LOADED, not part.is_meta)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                blank = torch.nan if buffer.is_floating_point() else 0
                setattr(module, name, torch.full_like(buffer, blank, device=device))
    with torch.device(device):
        model.initialize_weights()
