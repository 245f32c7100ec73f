"""Opening a packed 2:4 export (`checkpoints.packed`).

**CPU.** Packed layers become `PackedLinear`. The rest of the model runs in float32. `native=True` compiles the C++
kernel once for this machine (`kernels.packed_linear.native`) and uses it. An embedding and a head in INT8 stay codes
then, and the head's products are bfloat16.

**CUDA.** Each weight is unpacked and given to torch's own `to_sparse_semi_structured`, which packs it into what the
sparse tensor cores read. The layers stay `nn.Linear`. torch multiplies 16-bit semi-structured weights there, so codes
are widened to bfloat16 or float16 (times their scale). That saves 7/16 of the dense 16-bit bytes in memory, and runs
at the speed of the 16-bit sparse tensor cores. The 8-bit kernels are reached through private functions of torch only,
and are not used. **This path was written without a GPU at hand: it has not been run.**
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.buffers import compute_buffers
from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.packed import AGAIN, PackedCheckpoint, PackedLayer
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.packed_linear import Kernel
from hwpq_pipeline.kernels.packed_linear import native as native_kernel

from .packed_linear import PackedLinear, dense_weight
from .tables import Int8Embedding, Int8Head


def load_packed(
    directory: str | Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, *, native: bool = False
) -> Any:
    """The causal LM of a packed export, in evaluation mode; `generate` works as with any other.

    Args:
        directory: the export.
        device: `cpu` or a CUDA device.
        dtype: bfloat16 or float16, for CUDA; on the CPU everything except the packed weights is float32.
        native: whether to use the C++ kernel on the CPU; it wants g++ and ninja.

    Raises:
        HwpqError: not a packed export, a damaged one, no CUDA device of that name, or no compiler.
    """
    directory = Path(directory)
    packed = PackedCheckpoint(directory)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise HwpqError("there is no CUDA device", where=f"device {device!r}", remedy="Load it with device='cpu'.")
    kernel: Kernel = "native" if native else "numba"
    if native and not on_cuda:
        native_kernel.build()
    model: Any = meta_model(directory)
    for layer in packed.form.layers:
        linear, found = _linear(model, layer), packed.take(layer)
        _check_shape(found, linear, layer)
        if on_cuda:
            linear.weight = _semi_structured(found, layer, device, dtype)
        else:
            parent, _, name = layer.rpartition(".")
            bias = packed.tensors.pop(f"{layer}.bias", None)
            setattr(model.get_submodule(parent), name, PackedLinear(found, bias, name=layer, kernel=kernel))
    codes = _tables(packed) if native and not on_cuda else {}
    rest = {name: tensor.to(device, dtype if on_cuda else torch.float32) for name, tensor in packed.rest().items()}
    _fill(model, rest, device, str(directory))
    for name, (table, scale) in codes.items():
        _keep_codes(model, name, table, scale)
    return model.eval()


def _tables(packed: PackedCheckpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes (rows, in) and scales (rows, 1) of an embedding and a head in INT8, by name."""
    found = {}
    for name in packed.form.tables:
        codes, scale = (packed.tensors.get(f"{name}.{part}") for part in ("weight", "weight_scale"))
        if codes is not None and scale is not None and codes.dtype == torch.int8:
            found[name] = (codes, scale)
    return found


def _keep_codes(model: Any, name: str, codes: Tensor, scale: Tensor) -> None:
    """Let an embedding or a head, and the head that is tied to it, compute with codes.

    A module that does more than to look up or to multiply (a factor, a bias) stays as it is.
    """
    weight = model.get_submodule(name).weight
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if getattr(module, "weight", None) is not weight:
            continue
        if type(module) is nn.Embedding:
            model.set_submodule(path, Int8Embedding(codes, scale))
        elif type(module) is nn.Linear and getattr(module, "bias", None) is None:
            model.set_submodule(path, Int8Head(codes, scale))


def _linear(model: nn.Module, layer: str) -> Any:
    """The empty `nn.Linear` of that name."""
    try:
        return model.get_submodule(layer)
    except AttributeError as error:
        raise HwpqError("the model has no such layer", where=layer, remedy=AGAIN) from error


def _check_shape(packed: PackedLayer, linear: Any, layer: str) -> None:
    rows, kept = packed.kept.shape
    if (rows, 2 * kept) != (linear.out_features, linear.in_features):
        raise HwpqError(f"packed values of shape {(rows, kept)} do not fit", where=layer, remedy=AGAIN)


def _semi_structured(packed: PackedLayer, layer: str, device: str, dtype: torch.dtype) -> nn.Parameter:
    """The weight as the sparse tensor cores read it."""
    weight = dense_weight(packed, where=layer).to(device, dtype)
    return nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)


def _fill(model: Any, tensors: dict[str, Tensor], device: str, where: str) -> None:
    """Give the model the tensors that are not packed, and the buffers that it computes from its config."""
    found = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if found.unexpected_keys:
        raise HwpqError(f"a tensor too many: {found.unexpected_keys[0]}", where=where, remedy=AGAIN)
    compute_buffers(model, device)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    empty = [name for name, part in model.named_parameters() if part.is_meta]
    empty += [name for name, buffer in buffers if bool(buffer.isnan().any())]
    if empty:
        raise HwpqError(f"no tensor {empty[0]}", where=where, remedy=AGAIN)
