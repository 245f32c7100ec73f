"""Reading a Hugging Face checkpoint a tensor at a time.

safetensors puts a JSON header with names, dtypes, shapes and offsets before the raw bytes. Opening a file reads its
header, and reading a tensor reads that tensor, so a model is never in memory whole. The header's last offset must be
the file's size. This finds a truncated file when it is opened. A tensor whose bytes are not those that were written is
found when it is read (`checksums`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hwpq_pipeline.checkpoints.checksums import check_bytes, read_tensor
from hwpq_pipeline.checkpoints.json_file import FETCH_AGAIN, read_json
from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.checkpoints.places import check_inside
from hwpq_pipeline.errors import HwpqError, reading

#: Numbers that are checked at a time.
_PIECE = 2**22
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise HwpqError("no such file", where=str(path), remedy=FETCH_AGAIN)
    with reading(path, what="corrupt safetensors file", remedy=FETCH_AGAIN):
        return safe_open(path, framework="pt", backend="pread")  # mapped pages would stay in memory


def read_tensors(path: str | Path, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of one safetensors file by name.

    Args:
        path: the file.
        names: the wanted ones; None for all.

    Raises:
        HwpqError: the file is missing or corrupt, or lacks a wanted tensor.
    """
    path = Path(path)
    with _open(path) as stream:
        held = set(stream.keys())
        if missing := sorted(set(names or ()) - held):
            raise HwpqError(f"no tensor {missing[0]}", where=str(path), remedy=FETCH_AGAIN)
        wanted = sorted(held) if names is None else names
        return {name: read_tensor(stream, name, where=f"{path}: {name}", remedy=FETCH_AGAIN) for name in wanted}


def read_names(path: str | Path) -> list[str]:
    """Names of the tensors in one safetensors file; only its header is read.

    Raises:
        HwpqError: the file is missing or corrupt.
    """
    with _open(Path(path)) as stream:
        return list(stream.keys())


def _shards_by_tensor(index: Path) -> dict[str, str]:
    """The file of each tensor, from a checkpoint's index.

    Raises:
        HwpqError: the index is damaged, or names a file outside of its folder.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise HwpqError("its weight_map names no file for each tensor", where=str(index), remedy=FETCH_AGAIN)
    for file in found.values():
        check_inside(file, str(index))
    return found


class Checkpoint:
    """A checkpoint directory: `config.json` beside `model.safetensors` or its shards.

    Args:
        path: the directory.

    Raises:
        HwpqError: the directory, its config or a shard is missing or corrupt, or it holds no safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise HwpqError("no such checkpoint directory", where=str(path), remedy=FETCH_AGAIN)
        self.config = read_json(self.path / "config.json")
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._intact: set[str] = set()
        self._replaced: dict[str, torch.Tensor] = {}
        self._scan()

    def _scan(self) -> None:
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index.is_file():
            wanted: dict[str, str] | None = _shards_by_tensor(index)
            shards = sorted({self.path / file for file in (wanted or {}).values()})
        else:
            wanted, shards = None, [single]
            if not single.is_file():
                raise HwpqError(
                    "it holds no model.safetensors and no model.safetensors.index.json",
                    where=str(self.path),
                    remedy="Give a checkpoint in safetensors; pickled ones (.bin, .pt) are not read, because "
                    "unpickling runs code.",
                )
        for shard in shards:
            handle = self._handles[shard] = _open(shard)
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                view = handle.get_slice(name)
                self._files[name] = shard
                self._shapes[name] = tuple(view.get_shape())
                self._dtypes[name] = view.get_dtype()
        if missing := sorted(set(wanted or {}) - set(self._files)):
            raise HwpqError(
                f"{len(missing)} tensors of the index are in no shard, first {missing[0]}",
                where=str(self.path),
                remedy=FETCH_AGAIN,
            )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    @property
    def dtype(self) -> str:
        """The dtype of most weights (counted by elements), as safetensors writes it: `BF16`."""
        weight: dict[str, int] = {}
        for name, dtype in self._dtypes.items():
            weight[dtype] = weight.get(dtype, 0) + torch.Size(self._shapes[name]).numel()
        return max(weight, key=lambda dtype: weight[dtype])

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it.

        Raises:
            HwpqError: it is not float32, bfloat16 or float16.
        """
        return self._float(self.dtype)

    def _float(self, dtype: str) -> torch.dtype:
        if dtype not in _FLOATS:
            raise HwpqError(
                f"weights of dtype {dtype}",
                where=str(self.path),
                remedy=f"Use a checkpoint in one of {', '.join(_FLOATS)}.",
            )
        return _FLOATS[dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the safetensors files on disk."""
        return sum(shard.stat().st_size for shard in self._handles)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read these values from now on in the place of the files'.

        Raises:
            HwpqError: there is no such tensor, or it has another shape.
        """
        for name, tensor in tensors.items():
            if self.shape(name) != tuple(tensor.shape):
                raise HwpqError(
                    f"shape {tuple(tensor.shape)} for one of {self.shape(name)}",
                    where=f"{self.path}: {name}",
                    remedy="Check that config and weights belong together.",
                )
            self._replaced[name] = tensor.to(self.tensor_dtype(name))

    def check_bytes(self) -> None:
        """Compare every tensor with its checksum, where the files have checksums.

        Raises:
            HwpqError: a tensor's bytes are not those that were written.
        """
        for name in self._files:
            self._check_bytes(name)

    def check_dense(self) -> None:
        """Refuse a checkpoint that is quantized.

        Raises:
            HwpqError: its config says so.
        """
        if self.config.get("quantization_config") is not None:
            raise HwpqError(
                "the checkpoint is quantized already",
                where=f"{self.path}/config.json",
                remedy="Give the dense checkpoint that it was made from.",
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone.

        Raises:
            HwpqError: there is no such tensor.
        """
        self._known(name)
        return self._shapes[name]

    def tensor_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            HwpqError: there is no such tensor, or its dtype is none of floats.
        """
        self._known(name)
        return self._float(self._dtypes[name])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored.

        Raises:
            HwpqError: there is no such tensor, or it cannot be read.
        """
        self._known(name)
        return self._read(name, slice(None))

    def finite(self, name: str) -> torch.Tensor:
        """A tensor as stored, checked to be finite.

        Raises:
            HwpqError: as `tensor`, or NaN or infinity in it.
        """
        return self._checked(name, self.tensor(name))

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """A linear layer's weight, shape (out_features, in_features), float32, checked to be finite.

        Args:
            matrix: where the files hold it, as in the layer map.

        Raises:
            HwpqError: as `finite`.
        """
        self._known(matrix.tensor)
        step = self._shapes[matrix.tensor][0] // matrix.parts
        rows = slice(matrix.part * step, (matrix.part + 1) * step) if matrix.parts > 1 else slice(None)
        part = self._checked(matrix.tensor, self._read(matrix.tensor, rows))
        return replace(matrix, part=0, parts=1).of(part).float().contiguous()

    def _read(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor (along its first dimension). The whole is compared with its checksum, once."""
        if name in self._replaced:
            return self._replaced[name][rows]
        handle, where = self._handles[self._files[name]], f"{self._files[name]}: {name}"
        if rows == slice(None):
            return read_tensor(handle, name, where=where, remedy=FETCH_AGAIN)
        self._check_bytes(name)
        with reading(where, remedy=FETCH_AGAIN):
            found: torch.Tensor = handle.get_slice(name)[rows]
            return found

    def _check_bytes(self, name: str) -> None:
        if name not in self._intact:
            file = self._files[name]
            check_bytes(self._handles[file], name, where=f"{file}: {name}", remedy=FETCH_AGAIN)
            self._intact.add(name)

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # In pieces: of a large table the check would take twice the table's memory.
        pieces = tensor.reshape(-1).split(_PIECE) if tensor.is_floating_point() else ()
        if bad := sum(int((~torch.isfinite(piece)).sum()) for piece in pieces):
            raise HwpqError(
                f"{bad} of {tensor.numel()} weights are NaN or infinite",
                where=f"{self.path}: {name}",
                remedy="The checkpoint is damaged or overflowed in training; fetch it again or use another.",
            )
        return tensor

    def _known(self, name: str) -> None:
        if name not in self._files:
            raise HwpqError(
                f"no tensor {name}",
                where=str(self.path),
                remedy="Check that config and weights belong together.",
            )
