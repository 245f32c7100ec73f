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
from hwpq_pipeline.checkpoints.packed import PackedCheckpoint, PackedLayer
from hwpq_pipeline.checkpoints.packed_checks import check_fit
from hwpq_pipeline.checkpoints.packed_form import AGAIN, FLOATS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.packed_linear import Kernel
from hwpq_pipeline.kernels.packed_linear import native as native_kernel

from .fixed import fix
from .packed_linear import PackedLinear, dense_weight
from .shared_inputs import share_products
from .tables import Int8Embedding, Int8Head


def load_packed(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    native: bool = False,
) -> Any:
    """The causal LM of a packed export, in evaluation mode and for inference only; `generate` works as with any other.

    Args:
        directory: the export.
        device: `cpu` or a CUDA device.
        dtype: a float dtype of 16 or 32 bits, for CUDA; on the CPU everything except the packed weights is float32,
            whatever is given.
        native: whether to use the C++ kernel on the CPU; it wants g++ and ninja.

    Raises:
        HwpqError: not a packed export, a damaged one, no device or dtype of that name, or no compiler.
    """
    directory = Path(directory)
    place = _place(device, dtype)
    packed = PackedCheckpoint(directory)
    on_cuda = place.type == "cuda"
    kernel: Kernel = "native" if native else "numba"
    if native and not on_cuda:
        native_kernel.build()
    model: Any = meta_model(directory)
    check_fit(model, packed.form, packed.tensors, where=packed.where)
    for layer in packed.form.layers:
        found = packed.take(layer)
        if on_cuda:
            model.get_submodule(layer).weight = _semi_structured(found, layer, place, dtype)
        else:
            parent, _, name = layer.rpartition(".")
            bias = packed.tensors.pop(f"{layer}.bias", None)
            setattr(model.get_submodule(parent), name, PackedLinear(found, bias, name=layer, kernel=kernel))
    codes = _tables(packed) if native and not on_cuda else {}
    rest = {name: tensor.to(place, dtype if on_cuda else torch.float32) for name, tensor in packed.rest().items()}
    _fill(model, rest, str(place), str(directory))
    for name, (table, scale) in codes.items():
        _keep_codes(model, name, table, scale)
    fix(model.eval(), codes=bool(codes))
    if not on_cuda:
        share_products(model)
    return model


def _place(device: object, dtype: object) -> torch.device:
    """The device of that name, if a model of that dtype can be there."""
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:  # torch knows no such name
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise HwpqError("a packed model is not loaded there", where=f"device {device!r}", remedy="Give cpu or cuda.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise HwpqError("there is no CUDA device", where=f"device {device!r}", remedy="Load it with device='cpu'.")
    if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in FLOATS:
        names = " or ".join(f"torch.{name}" for name in FLOATS)
        raise HwpqError("a packed model does not compute in it", where=f"dtype {dtype!r}", remedy=f"Give {names}.")
    return found


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


def _semi_structured(packed: PackedLayer, layer: str, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
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
