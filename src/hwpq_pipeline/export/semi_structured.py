"""The packed 2:4 checkpoint: half of the weights are not there, on disk and in memory.

For each 2:4 layer (`compression/packing.py` has the bits):

    grid        tensors                                                     of the dense 2:4 layer's bytes in that grid
    none        weight_kept (out, in/2) in the dense model's dtype           9/16
    fp8, int8   weight_kept (out, in/2) float8_e4m3fn or int8, weight_scale  5/8
    int4        weight_kept (out, in/4) uint8: two codes a byte, the first   3/4
                in the lower half, offset by 8; weight_scale (out, groups)
    all         weight_positions (out, ⌈in/8⌉) uint8

Everything else is copied. The scales keep their values, as in the compressed-tensors export.

No engine reads 2:4 in a packed form any more, so this format is this project's own and `hwpq_pipeline.runtime` loads
it: with a CPU kernel for decoding that reads the packed bytes, and into torch's semi-structured tensors on a CUDA GPU.
The weights are in `packed.safetensors`, not `model.safetensors`, so that a loader that does not know the format finds
no weights rather than a model with half of them missing. `packed.json` says the grid and the packed layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_tensors, write_text
from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.errors import HwpqError

from .card import CardInfo, render_card
from .compressed_tensors import copy_side_files

VERSION = 1


def export_semi_structured(
    model_dir: str | Path, compressed_dir: str | Path, target_dir: str | Path, *, card: CardInfo | None = None
) -> Path:
    """Write the packed checkpoint of one 2:4 variant, whole or not at all.

    Args:
        model_dir: the dense checkpoint.
        compressed_dir: the format-neutral compressed model, of structure `2of4`.
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.

    Returns:
        `target_dir`, which `hwpq_pipeline.runtime.load_packed` opens.

    Raises:
        HwpqError: a variant that is not 2:4, a damaged input, or one that does not belong to the dense model.
    """
    dense, compressed = Checkpoint(model_dir), CompressedModel(compressed_dir)
    if compressed.structure != "2of4":
        raise HwpqError(
            f"structure {compressed.structure} cannot be packed",
            where=str(compressed_dir),
            remedy="Only variants with structure 2of4 have half of their weights to leave out.",
        )
    if lost := sorted(layer for layer in compressed.layers if f"{layer}.weight" not in dense):
        raise HwpqError(
            f"the dense model has no {lost[0]}.weight",
            where=str(dense.path),
            remedy="Compress this model again: the compressed layers are of another one.",
        )
    with atomic_directory(target_dir) as partial:
        write_json(partial / "config.json", dense.config)
        layers = {layer: list(dense.shape(f"{layer}.weight")) for layer in compressed.layers}
        write_json(partial / "packed.json", {"version": VERSION, "grid": compressed.grid, "layers": layers})
        write_tensors(partial / "packed.safetensors", dict(_tensors(dense, compressed)))
        copy_side_files(Path(model_dir), partial)
        if card is not None:
            write_text(partial / "README.md", render_card(card))
    return Path(target_dir)


def _tensors(dense: Checkpoint, compressed: CompressedModel) -> Iterator[tuple[str, Tensor]]:
    scale_dtype = compressed.scale_dtype(dense.torch_dtype)
    for name in dense.names:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in compressed.layers:
            yield name, dense.finite(name)
            continue
        shape, where = dense.shape(name), f"{compressed.path}: {layer}"
        if layer in compressed.quantized:
            quantized = compressed.read_quantized(layer, shape)
            kept, positions = pack_two_of_four(quantized.codes, where=where)
            yield f"{layer}.weight_scale", quantized.scale.to(scale_dtype)
            yield f"{layer}.weight_kept", pack_nibbles(kept) if compressed.grid == "int4" else kept
        else:
            kept, positions = pack_two_of_four(compressed.read_weight(layer, shape), where=where)
            yield f"{layer}.weight_kept", kept.to(dense.torch_dtype)
        yield f"{layer}.weight_positions", positions


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes (−8 … 7) a byte, the first in the lower half: (out, n) int8 to (out, n / 2) uint8."""
    shifted = (codes.to(torch.int16) + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4
