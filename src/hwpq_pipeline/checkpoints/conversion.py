"""Which tensors of a checkpoint's files make up which parameters of the model that transformers builds.

Files and module tree agree for most models. For others transformers renames (a wrapper's prefix, a base model without
one), joins (the experts of Mixtral, each in tensors of its own, into one stack), splits, or transposes. Its own table
of renamings and operations says how, and it is used here as it stands: names go through its renamings, and **tensors of
numbered elements go through its operations**. What comes out shows where each element of the files lies in the
parameters. The numbered tensors are as small as the shapes' common divisor allows, so that this costs next to nothing.

A parameter's matrix that is a file's matrix, or a run of its rows, is found so. One that is mixed from several in
another way (interleaved rows) is not, and stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.errors import HwpqError

Shape = tuple[int, ...]
#: A parameter's matrix that is put together from more runs of rows than this is left dense.
MOST_RUNS = 8


@dataclass
class Source:
    """Files' tensors that make one parameter.

    Attributes:
        converter: of transformers; None for a tensor that is the parameter.
        patterns: its pattern that each tensor matched.
    """

    converter: Any
    patterns: dict[str, str] = field(default_factory=dict)


def parameters_of_files(model: Any, names: Iterable[str], quantizer: Any = None) -> dict[str, Source]:
    """Which files' tensors make which parameters (or buffers) of the model; tensors that it does not read are left out.

    Args:
        model: of transformers, on the meta device.
        names: of the files' tensors.
        quantizer: of transformers, for a quantized checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as transformers does: renamed for nothing
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target in known:
            source = found.setdefault(target, Source(by_pattern.get(pattern or "")))
            source.patterns[name] = pattern or name
    return found


def stored_matrices(
    model: Any, sources: Mapping[str, Source], shapes: Mapping[str, Shape], matrices: Iterable[Matrix], where: str
) -> Iterator[tuple[Matrix, Matrix]]:
    """For each matrix of the parameters the files' matrices that it is made of, with the rows that they fill.

    Args:
        model: as for `parameters_of_files`.
        sources: what that gave.
        shapes: of the files' tensors.
        matrices: of the model's parameters, in order.
        where: the checkpoint, for errors.

    Yields:
        A file's matrix and its place among the parameters. Matrices that are mixed from several are left out.

    Raises:
        HwpqError: the files hold nothing of a matrix.
    """
    numbered = _Numbered(model, sources, shapes)
    for matrix in matrices:
        source = sources.get(matrix.tensor)
        if source is None:
            raise HwpqError(
                f"no tensor for the model's {matrix.tensor}",
                where=where,
                remedy="Check that config and weights belong together.",
            )
        if source.converter is None:
            (name,) = source.patterns
            yield replace(matrix, tensor=name), matrix
        else:
            yield from numbered.runs(matrix)


class _Numbered:
    """Tensors of numbered elements, taken through transformers' operations once for each parameter.

    Args: as for `stored_matrices`.
    """

    def __init__(self, model: Any, sources: Mapping[str, Source], shapes: Mapping[str, Shape]) -> None:
        self.model, self.sources, self.shapes = model, sources, shapes
        self.parameters: dict[str, Tensor | None] = {}
        self.starts: list[tuple[int, str, Shape]] = []
        self.unit = 1

    def runs(self, matrix: Matrix) -> list[tuple[Matrix, Matrix]]:
        """The files' matrices that fill a matrix of the parameters from top to bottom, or nothing."""
        if matrix.tensor not in self.parameters:
            self._convert(matrix.tensor)
        numbers = self.parameters[matrix.tensor]
        if numbers is None:
            return []
        found = list(_runs(matrix.of(numbers), self.starts, self.unit))
        if len(found) > MOST_RUNS or sum(rows for _, _, rows in found) != len(matrix.of(numbers)) * self.unit:
            return []
        if len(found) == 1:
            return [(found[0][0], matrix)]
        return [(stored, replace(matrix, row=row, rows=rows)) for stored, row, rows in found]

    def _convert(self, parameter: str) -> None:
        source = self.sources[parameter]
        names = list(source.patterns)
        self.unit = _unit(self.shapes[name] for name in names)
        converter = deepcopy(source.converter)
        self.starts, start = [], 0
        for name in names:
            small = _small(self.shapes[name], self.unit)
            count = torch.Size(small).numel()
            converter.add_tensor(parameter, name, source.patterns[name], torch.arange(start, start + count).view(small))
            self.starts.append((start, name, small))
            start += count
        self.parameters = {parameter: None}  # the last one alone: every parameter is asked for in one go
        try:
            made = converter.convert(parameter, model=self.model, config=self.model.config)
        except Exception:  # noqa: BLE001 (an operation that wants the real shapes: the matrix stays dense, and is told)
            return
        for name, tensor in made.items():
            self.parameters[name] = (tensor[0] if isinstance(tensor, list) else tensor).contiguous()


def _unit(shapes: Iterable[Shape]) -> int:
    """The largest divisor of all (last two) dimensions that leaves at least two in each."""
    sizes = [size for shape in shapes for size in shape[-2:]]
    common = gcd(*sizes)
    return next(
        (unit for unit in range(common, 0, -1) if common % unit == 0 and all(size // unit >= 2 for size in sizes)), 1
    )


def _small(shape: Shape, unit: int) -> Shape:
    return (*shape[:-2], *(size // unit for size in shape[-2:]))


def _runs(numbers: Tensor, starts: list[tuple[int, str, Shape]], unit: int) -> Iterator[tuple[Matrix, int, int]]:
    """Files' matrices in a matrix of numbers, shape (out, in), from top to bottom: each with its first row and height.

    Nothing more is given once a row is not a whole row of a file's matrix.
    """
    at = 0
    while at < len(numbers):
        found = _matrix_at(numbers[at:], starts, unit)
        if found is None:
            return
        stored, height = found
        yield stored, at * unit, height * unit
        at += height


def _matrix_at(numbers: Tensor, starts: list[tuple[int, str, Shape]], unit: int) -> tuple[Matrix, int] | None:
    """The file's matrix that the numbers begin with, and how many of their rows it fills."""
    first = int(numbers[0, 0])
    start, name, shape = next(entry for entry in reversed(starts) if entry[0] <= first)
    high, wide = shape[-2:]
    parts = torch.Size(shape[:-2]).numel()
    part, inside = divmod(first - start, high * wide)
    row, column = divmod(inside, wide)
    transposed = numbers.shape[1] > 1 and int(numbers[0, 1]) - first == wide
    height = min(len(numbers), (wide - column) if transposed else (high - row))
    ids = torch.arange(start, start + parts * high * wide).view(parts, high, wide)[part]
    expected = (ids.T[column : column + height] if transposed else ids[row : row + height]).contiguous()
    same = (numbers[:height] == expected).all(dim=1) if numbers.shape[1] == expected.shape[1] else torch.zeros(1)
    height = int(same.long().cumprod(0).sum())
    if not height:
        return None
    whole = height == (wide if transposed else high)
    begin = column if transposed else row
    rows = {} if whole else {"row": begin * unit, "rows": height * unit}
    return Matrix(name, part, parts, transposed, **rows), height
