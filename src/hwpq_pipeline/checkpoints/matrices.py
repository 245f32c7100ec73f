"""Where a linear layer's weight lies inside a tensor: the whole of it, one expert of a stack, some rows, transposed.

A layer's weight has shape (out_features, in_features). A file or a module may hold it as it is, transposed (`Conv1D`
and some experts), as one of many equal parts of a stack (experts: three dimensions, or two with the experts' rows one
after another), or as a run of rows in a wider matrix (gate and up in one). `Matrix` says which, and `of` gives the
view.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight inside a tensor.

    Attributes:
        tensor: the tensor's name, in a file or in a module tree.
        part, parts: which of how many equal parts along the first dimension; (0, 1) for a tensor that is one matrix.
        transposed: whether it lies there as (in_features, out_features).
        row, rows: its first output row, and how many; None for all.
    """

    tensor: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    row: int = 0
    rows: int | None = None

    @property
    def alone(self) -> bool:
        """Whether the tensor is this weight and nothing else, as (out_features, in_features)."""
        return self.parts == 1 and not self.transposed and self.rows is None

    def of(self, tensor: Tensor) -> Tensor:
        """The weight as a view of the (contiguous) tensor, shape (out_features, in_features)."""
        matrix = tensor.view(self.parts, -1, tensor.shape[-1])[self.part]
        if self.transposed:
            matrix = matrix.T
        return matrix if self.rows is None else matrix[self.row : self.row + self.rows]

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, int]:
        """(out_features, in_features), from the tensor's shape."""
        high, wide = tensor[-2], tensor[-1]
        if self.parts > 1 and len(tensor) == 2:
            high //= self.parts
        if self.transposed:
            high, wide = wide, high
        return (high if self.rows is None else self.rows, wide)
