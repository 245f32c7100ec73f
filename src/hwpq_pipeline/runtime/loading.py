"""Opening a packed 2:4 export (`export/semi_structured.py`).

**CPU.** Packed layers become `PackedLinear`; the rest of the model runs in float32.

**CUDA.** Each weight is unpacked and given to torch's own `to_sparse_semi_structured`, which packs it into what the
sparse tensor cores read; the layers stay `nn.Linear`. torch multiplies 16-bit semi-structured weights there, so codes
are widened to bfloat16 or float16 (times their scale): the saving is 7/16 of the dense 16-bit bytes in memory, and the
speed that of the 16-bit sparse tensor cores. The 8-bit kernels are reached through private functions of torch only,
and are not used. **This path was written without a GPU at hand: it has not been run.**
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.reader import read_json, read_tensors
from hwpq_pipeline.errors import HwpqError

from .packed_linear import PackedLinear, dense_weight

VERSION = 1
_AGAIN = "Export the variant again with format semi-structured."


def load_packed(directory: str | Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The causal LM of a packed export, in evaluation mode; `generate` works as with any other.

    Args:
        directory: the export.
        device: `cpu` or a CUDA device.
        dtype: bfloat16 or float16, for CUDA; on the CPU everything but the packed weights is float32.

    Raises:
        HwpqError: not a packed export, a damaged one, or no CUDA device of that name.
    """
    directory = Path(directory)
    recipe = read_json(directory / "packed.json")
    if recipe.get("version") != VERSION:
        raise HwpqError(f"packed format {recipe.get('version')!r}", where=f"{directory}/packed.json", remedy=_AGAIN)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise HwpqError("there is no CUDA device", where=f"device {device!r}", remedy="Load it with device='cpu'.")
    tensors = read_tensors(directory / "packed.safetensors")
    model: Any = meta_model(directory)
    for layer in recipe["layers"]:
        _replace(model, layer, tensors, device if on_cuda else None, dtype)
    rest = {name: tensor.to(device, dtype if on_cuda else torch.float32) for name, tensor in tensors.items()}
    _fill(model, rest, device, str(directory))
    return model.eval()


def _replace(model: nn.Module, layer: str, tensors: dict[str, Tensor], device: str | None, dtype: torch.dtype) -> None:
    """Put a packed (or semi-structured) layer in the place of the empty `nn.Linear`; its tensors are used up."""
    parts = [tensors.pop(f"{layer}.weight_{part}", None) for part in ("kept", "positions", "scale")]
    kept, positions, scale = parts
    try:
        linear: Any = model.get_submodule(layer)
    except AttributeError as error:
        raise HwpqError("the model has no such layer", where=layer, remedy=_AGAIN) from error
    if kept is None or positions is None:
        raise HwpqError("its packed tensors are missing", where=layer, remedy=_AGAIN)
    if kept.dtype == torch.uint8:
        kept = unpack_nibbles(kept)
    if (kept.shape[0], 2 * kept.shape[1]) != (linear.out_features, linear.in_features):
        raise HwpqError(f"packed values of shape {tuple(kept.shape)} do not fit", where=layer, remedy=_AGAIN)
    if device is not None:
        weight = dense_weight(kept, positions, scale, where=layer).to(device, dtype)
        linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        return
    parent, _, name = layer.rpartition(".")
    packed = PackedLinear(kept, positions, scale, tensors.pop(f"{layer}.bias", None), name=layer)
    setattr(model.get_submodule(parent), name, packed)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `export.semi_structured.pack_nibbles`: (out, n / 2) uint8 to (out, n) int8."""
    both = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)
    return (both.to(torch.int16) - 8).to(torch.int8)


def _fill(model: Any, tensors: dict[str, Tensor], device: str, where: str) -> None:
    """Give the model everything that is not packed, and what it computes from its config."""
    found = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if found.unexpected_keys:
        raise HwpqError(f"a tensor too many: {found.unexpected_keys[0]}", where=where, remedy=_AGAIN)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary tables: made, not stored
            parent, _, last = name.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(parent), last, type(module)(config=model.config))
    empty = [name for name, part in (*model.named_parameters(), *model.named_buffers()) if part.is_meta]
    if empty:
        raise HwpqError(f"no tensor {empty[0]}", where=where, remedy=_AGAIN)
