"""Whether the tensors of a packed checkpoint are those that its form and its model want: names, shapes, dtypes, values.

The runtime reads a checkpoint whole and vLLM's plugin a tensor at a time, so these take tensors that are there and
tensors of the meta device alike: only `check_finite` looks at values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.packed_form import AGAIN, FLOATS, WEIGHTS, PackedForm
from hwpq_pipeline.checkpoints.reader import read_names, read_tensors
from hwpq_pipeline.errors import HwpqError


def check_names(form: PackedForm, names: Collection[str], *, where: str) -> None:
    """That a file holds the tensors of the packed layers and tables, no others of such names, and as many as it says.

    Args:
        form: what it says.
        names: of its tensors.
        where: the file, for errors.

    Raises:
        HwpqError: a tensor that is missing, or one too many.
    """
    wanted = set(form.named)
    if missing := [name for name in form.named if name not in names]:
        raise HwpqError(f"no tensor {missing[0]}", where=where, remedy=AGAIN)
    packed = ("weight_kept", "weight_positions", "weight_scale")
    if stray := sorted(name for name in names if name.rpartition(".")[2] in packed and name not in wanted):
        raise HwpqError(f"a tensor too many: {stray[0]}", where=where, remedy=AGAIN)
    if len(names) != form.tensors:
        raise HwpqError(f"{len(names)} tensors instead of {form.tensors}", where=where, remedy=AGAIN)


def check_finite(tensor: Tensor, *, where: str) -> None:
    """That a tensor has no NaN and no infinity in it.

    Raises:
        HwpqError: it has.
    """
    if tensor.is_floating_point():
        plain = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        if not bool(plain.isfinite().all()):
            raise HwpqError("values that are NaN or infinite", where=where, remedy=AGAIN)


def check_layers(form: PackedForm, tensors: Mapping[str, Tensor]) -> None:
    """That the tensors of each packed layer and of each table belong together.

    Raises:
        HwpqError: another dtype or shape.
    """
    for layer in form.layers:
        kept = tensors[f"{layer}.weight_kept"]
        _check_dtype(f"{layer}.weight_kept", kept, (form.kept_dtype,))
        rows, columns = _packed_shape(form, layer, kept)
        _check(f"{layer}.weight_positions", tensors, ("uint8",), (rows, -(-columns // 8)))
        if form.scale_dtype is not None:
            groups = 1 if form.group_size is None else columns // form.group_size
            _check(f"{layer}.weight_scale", tensors, (form.scale_dtype,), (rows, groups))
    for table in form.tables:
        codes, scales = tensors[f"{table}.weight"], (FLOATS if form.scale_dtype is None else (form.scale_dtype,))
        _check(f"{table}.weight", tensors, (str(form.table_dtype),), tuple(codes.shape))
        _check(f"{table}.weight_scale", tensors, scales, (*codes.shape[:1], 1))


def _packed_shape(form: PackedForm, layer: str, kept: Tensor) -> tuple[int, int]:
    """(out, in) of the weight that a layer's kept values stand for."""
    columns = (4 if form.four_bits else 2) * kept.shape[1] if kept.ndim == 2 else 0
    if not (columns and kept.numel()) or columns % max(4, form.group_size or 4):
        raise HwpqError(f"packed values of shape {tuple(kept.shape)} do not fit", where=layer, remedy=AGAIN)
    return kept.shape[0], columns


def _check(name: str, tensors: Mapping[str, Tensor], dtypes: Collection[str], shape: tuple[int, ...]) -> None:
    _check_dtype(name, tensors[name], dtypes)
    if tensors[name].shape != shape:
        raise HwpqError(f"shape {tuple(tensors[name].shape)} instead of {shape}", where=name, remedy=AGAIN)


def _check_dtype(name: str, tensor: Tensor, dtypes: Collection[str]) -> None:
    if (found := str(tensor.dtype).removeprefix("torch.")) not in dtypes:
        raise HwpqError(f"{found} instead of {' or '.join(dtypes)}", where=name, remedy=AGAIN)


def check_fit(model: nn.Module, form: PackedForm, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """That a checkpoint's tensors are those of its model; to be asked after `check_layers`.

    Args:
        model: of its config, on the meta device.
        form: what it says.
        tensors: all of them, of any device.
        where: the file, for errors.

    Raises:
        HwpqError: a tensor that the model lacks or the file lacks, or one of another shape or dtype.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for layer in form.layers:
        linear = modules.get(layer)
        if linear is None or not hasattr(linear, "in_features"):
            raise HwpqError("the model has no such layer", where=layer, remedy=AGAIN)
        shape, wanted = _packed_shape(form, layer, tensors[f"{layer}.weight_kept"]), tuple(linear.weight.shape)
        if shape != wanted:
            raise HwpqError(f"packed values for {shape} do not fit a layer of {wanted}", where=layer, remedy=AGAIN)
    expected, packed, named = model.state_dict(), {f"{layer}.weight" for layer in form.layers}, set(form.named)
    for name, tensor in tensors.items():
        if name in named and name not in expected:
            continue
        if name not in expected or name in packed:
            raise HwpqError(f"a tensor too many: {name}", where=where, remedy=AGAIN)
        found, own = (str(part.dtype).removeprefix("torch.") for part in (tensor, expected[name]))
        floats = FLOATS if expected[name].is_floating_point() else (own,)
        _check(name, tensors, (found,) if name in named else floats, tuple(expected[name].shape))  # codes were checked
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for names in aliases.values():  # of tied ones the file holds one
        if not any(name in tensors or name in packed for name in names):
            raise HwpqError(f"no tensor {names[0]}", where=where, remedy=AGAIN)


def check_file(directory: Path, form: PackedForm, build: Callable[[], nn.Module | None]) -> None:
    """All of these checks on a folder, its tensors read one at a time and compared with their checksums.

    Args:
        directory: of the checkpoint.
        form: what it says.
        build: gives its model on the meta device, or None where it is not known.

    Raises:
        HwpqError: a file that is missing or damaged, or tensors that are not those of the form and the model.
    """
    file = directory / WEIGHTS
    names = read_names(file)
    check_names(form, names, where=str(file))
    shapes = {}
    for name in sorted(names):
        tensor = read_tensors(file, [name])[name]
        check_finite(tensor, where=f"{file}: {name}")
        shapes[name] = torch.empty_like(tensor, device="meta")
    check_layers(form, shapes)
    if (model := build()) is not None:
        check_fit(model, form, shapes, where=str(file))
