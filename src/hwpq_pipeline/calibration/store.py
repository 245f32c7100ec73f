"""Activation statistics on disk: one safetensors file a decoder block, and an index.

`index.json` names, for each block, its file and its input groups: the layers fed by one and the same tensor (q/k/v;
gate/up), which therefore share one Gram matrix. A group is named by its first layer in module order. It holds two
float32 tensors, or in diagonal mode the second alone:

    <group>.gram     (in, in)    Σ x xᵀ over all tokens
    <group>.energy   (in,)       Σ x_j², its diagonal: the energy (second moment) of each input

The diagonal stands beside its matrix because the selection needs nothing else: it reads kilobytes where the matrices
are hundreds of megabytes. The tensors are sums, not means. Each file can be read alone, whatever the model's size.

With `"keep": "nothing"` in the index the matrices are left out. Then `tokens.safetensors` has the token ids, and the
index says how they ran (`batch`, `every_expert`): all that is needed to sum the same again (`walk`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.errors import HwpqError

#: 2 since the diagonal stands beside the matrix.
FORMAT = 2
_AGAIN = "Run the calibrate pipeline again."
_TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class InputGroup:
    """Layers fed by the same tensor.

    Attributes:
        name: the first of `layers`.
        features: length of an input vector.
        layers: names of the layers, in module order.
        block: index of the decoder block.
        tokens: that reached them: all tokens, or those that were routed to an expert.
    """

    name: str
    features: int
    layers: tuple[str, ...]
    block: int
    tokens: int


class Statistics:
    """Statistics that were written by `collect_statistics`, read a group at a time.

    Args:
        path: the directory.

    Attributes:
        mode: `gram` or `diagonal`.
        tokens: number of tokens summed over.
        keep: `sums`, or `nothing` where matrices were made and left out.
        dtype: of the forward pass that gave them, `float32` or `bfloat16`.
        batch: samples that went at a time, where nothing is kept; else 0.
        every_expert: whether all tokens went through every expert, where nothing is kept; else false.

    Raises:
        HwpqError: the index or a block's file is missing, or the index has another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = read_json(self.path / "index.json")
        try:
            if self.index["format"] != FORMAT:
                raise ValueError(f"format {self.index['format']} where this version reads {FORMAT}")
            if self.index["mode"] not in ("gram", "diagonal"):
                raise ValueError(f"mode {self.index['mode']}")
            self.mode: str = self.index["mode"]
            self.keep = str(self.index.get("keep", "sums"))
            if self.keep not in ("sums", "nothing"):
                raise ValueError(f"keep {self.keep}")
            self.tokens = int(self.index["tokens"])
            self.dtype = str(self.index.get("dtype", "float32"))
            if self.dtype not in ("float32", "bfloat16"):
                raise ValueError(f"dtype {self.dtype}")
            again = self.keep == "nothing"
            self.batch = int(self.index["batch"]) if again else 0
            self.every_expert = again and bool(self.index["every_expert"])
            self._files = [str(block["file"]) for block in self.index["blocks"]]
            self._groups = {
                group["name"]: InputGroup(
                    group["name"],
                    int(group["features"]),
                    tuple(group["layers"]),
                    number,
                    int(group.get("tokens", self.tokens)),
                )
                for number, block in enumerate(self.index["blocks"])
                for group in block["groups"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise HwpqError(
                f"not an index of statistics ({error})", where=str(self.path / "index.json"), remedy=_AGAIN
            ) from error
        self._of_layer = {layer: group.name for group in self._groups.values() for layer in group.layers}
        for file in [*self._files, *([_TOKENS] if again else [])]:
            if not (self.path / file).is_file():
                raise HwpqError("no such file", where=str(self.path / file), remedy=_AGAIN)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._files)

    @property
    def layers(self) -> list[str]:
        """Names of all layers that have statistics."""
        return list(self._of_layer)

    def groups(self, block: int | None = None) -> list[InputGroup]:
        """All input groups, or those of one block, in module order."""
        return [group for group in self._groups.values() if block is None or group.block == block]

    def group_of(self, layer: str) -> str:
        """Name of the input group that a layer belongs to.

        Raises:
            HwpqError: there are no statistics of this layer.
        """
        if layer not in self._of_layer:
            raise HwpqError(f"no statistics of layer {layer}", where=str(self.path), remedy=_AGAIN)
        return self._of_layer[layer]

    def tokens_of(self, layer: str) -> int:
        """Tokens that reached a group (or the group of a layer)."""
        return self._groups[self.group_of(layer)].tokens

    def features_of(self, layer: str) -> int:
        """Inputs of a group (or of the group of a layer)."""
        return self._groups[self.group_of(layer)].features

    def block_of(self, layer: str) -> int:
        """Decoder block of a group (or of the group of a layer)."""
        return self._groups[self.group_of(layer)].block

    def token_ids(self) -> torch.Tensor:
        """The tokens, (samples, length), int64, where nothing is kept of the matrices.

        Raises:
            HwpqError: the file is missing or corrupt.
        """
        return read_tensors(self.path / _TOKENS, ["token_ids"])["token_ids"]

    def gram(self, group: str) -> torch.Tensor:
        """`Σ x xᵀ`, shape (in, in), float32, of a group (or of the group of a layer).

        Raises:
            HwpqError: the statistics hold no matrices, the file is corrupt, or the group is unknown.
        """
        if self.mode != "gram" or self.keep != "sums":
            setting = "calibration mode to gram" if self.mode != "gram" else "calibration.keep to sums"
            raise HwpqError(
                "the statistics hold the diagonal only",
                where=str(self.path),
                remedy=f"Set {setting} and run the calibrate pipeline again.",
            )
        return self._read(group, "gram", 2)

    def energy(self, group: str) -> torch.Tensor:
        """`Σ x_j²`, shape (in,), float32, of a group (or of the group of a layer), in both modes.

        Raises:
            HwpqError: the file is corrupt, or the group is unknown.
        """
        return self._read(group, "energy", 1)

    def _read(self, name: str, suffix: str, dimensions: int) -> torch.Tensor:
        group = self._groups[self.group_of(name)]
        file = self.path / self._files[group.block]
        tensor = read_tensors(file, [f"{group.name}.{suffix}"])[f"{group.name}.{suffix}"]
        if tuple(tensor.shape) != (group.features,) * dimensions:
            raise HwpqError(
                f"shape {tuple(tensor.shape)} for {group.features} features",
                where=f"{file}: {group.name}.{suffix}",
                remedy=_AGAIN,
            )
        return tensor


def block_part(number: int) -> str:
    """The name of a block's part, and of its file."""
    return f"block_{number:03d}"


def stored_block(
    groups: Sequence[tuple[str, Sequence[str]]],
    totals: Mapping[str, torch.Tensor],
    tokens: Mapping[str, int] | None,
    *,
    mode: str,
    keep: str = "sums",
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a block's file holds, and its entry in the index, as a part (`checkpoints.parts`).

    Args:
        groups: name and layers of each input group, in module order.
        totals: the sum of each group, by its name: `Σ x xᵀ`, or in diagonal mode `Σ x_j²`.
        tokens: how many tokens reached each group, by its name; None if all did.
        mode: `gram` or `diagonal`.
        keep: `sums`, or `nothing` to leave matrices out.
    """
    stored = {}
    for name, total in totals.items():
        if mode == "gram" and keep == "sums":
            stored[f"{name}.gram"] = total
        stored[f"{name}.energy"] = total.diagonal().clone() if mode == "gram" else total
    entries = [
        {"name": name, "features": totals[name].shape[0], "layers": list(layers)}
        | ({} if tokens is None else {"tokens": tokens[name]})
        for name, layers in groups
    ]
    return stored, {"groups": entries}


def gather_statistics(
    parts: Parts, blocks: int, directory: Path, token_ids: torch.Tensor, *, mode: str, keep: str = "sums", **facts: Any
) -> None:
    """The blocks' parts as one directory of statistics.

    Args:
        parts: of all blocks (`block_part`, `stored_block`).
        blocks: their number.
        directory: an existing, empty directory.
        token_ids: (samples, length) what was summed over; written too where they are needed again.
        mode, keep: as for `stored_block`.
        facts: how it was done.
    """
    entries = []
    for name in map(block_part, range(blocks)):
        parts.hand_over(name, directory / f"{name}.safetensors")
        entries.append({"file": f"{name}.safetensors", **parts.told(name)})
    if keep == "nothing":
        write_tensors(directory / _TOKENS, {"token_ids": token_ids})
    index = {"format": FORMAT, "mode": mode, "keep": keep, "tokens": token_ids.numel(), **facts}
    write_json(directory / "index.json", index | {"blocks": entries})
