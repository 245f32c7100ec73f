"""The compressed-tensors checkpoint: what transformers and vLLM load today.

A quantized linear layer `w ≈ scale · code` is stored as

    grid                 tensors                                           activations      format
    fp8_e4m3, fp8_e5m2   weight float8_e4m3fn (out, in)                    fp8, per token   float-quantized
                         weight_scale (out, 1)
    int8                 weight int8 (out, in), weight_scale (out, 1)      int8, per token  int-quantized
    int4                 weight_packed int32 (out, ⌈in/8⌉)                 not quantized    pack-quantized
                         weight_scale (out, groups), weight_shape int64 (2)
    none                 weight (out, in) in the dense model's dtype       not quantized    plain checkpoint

Scales keep their values. They are stored in the dense model's dtype when every one of them is a number of
that dtype, else in float32, for the whole checkpoint alike. Rounding them here would move every weight of a
channel by up to 2⁻⁹ of itself, after the codes have been chosen for the scale. Engines differ: vLLM keeps FP8
and INT8 scales in float32 and casts INT4 scales to the model's dtype; transformers casts all to the dtype it
loads in. Scales that are bfloat16 numbers from the start are therefore the same everywhere, and take half the
bytes.

Pruned weights are stored as zeros, dense, without a `sparsity_config`: engines have dropped the sparse
formats and refuse checkpoints that announce one. Everything outside the layers (embeddings, norms, `lm_head`)
is copied as it is; a tied `lm_head` has no tensor and gets none.

One shard's tensors are in memory at a time, since safetensors writes a file whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.compressed import CompressedModel, QuantizedLayer
from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import (
    SHARD_BYTES,
    atomic_directory,
    write_json,
    write_tensors,
    write_text,
)
from hwpq_pipeline.errors import HwpqError

from .card import CardInfo, render_card

#: What goes beside the weights, as in the dense checkpoint; the rest (weights, config, card) is written here.
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_PRESETS = {"fp8_e4m3": "FP8_DYNAMIC", "fp8_e5m2": "FP8_DYNAMIC", "int8": "INT8", "int4": "W4A16"}
_FORMATS = {"fp8_e4m3": "float-quantized", "fp8_e5m2": "float-quantized", "int8": "int-quantized",
            "int4": "pack-quantized"}  # fmt: skip


def export_checkpoint(
    model_dir: str | Path,
    compressed_dir: str | Path,
    target_dir: str | Path,
    *,
    card: CardInfo | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the deployable checkpoint of one variant, whole or not at all.

    Args:
        model_dir: the dense checkpoint.
        compressed_dir: the format-neutral compressed model: `recipe.json` and safetensors with
            `<layer>.codes` and `<layer>.scale`, or `<layer>.weight`.
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.
        shard_bytes: a weight file's size at most (one larger tensor makes one file).

    Returns:
        `target_dir`. It loads with `AutoModelForCausalLM.from_pretrained` and no further argument.

    Raises:
        HwpqError: a damaged or incomplete input, or one that does not belong to the dense model.
    """
    dense = Checkpoint(model_dir)
    if "quantization_config" in dense.config:
        raise HwpqError(
            "it is quantized already",
            where=f"{model_dir}/config.json",
            remedy="Start from the unquantized checkpoint.",
        )
    compressed = CompressedModel(compressed_dir)
    scale_dtype = compressed.scale_dtype(dense.torch_dtype)
    config = dict(dense.config)
    if compressed.quantized:
        config["quantization_config"] = quantization_config(
            compressed.grid or "", compressed.group_size, _left_alone(model_dir, compressed.quantized)
        )
    with atomic_directory(target_dir) as partial:
        write_json(partial / "config.json", config)
        write_json(partial / "recipe.json", {"variant": compressed.variant, "recipe": compressed.recipe})
        _write_shards(partial, _tensors(dense, compressed, scale_dtype), shard_bytes)
        copy_side_files(Path(model_dir), partial)
        if card is not None:
            write_text(partial / "README.md", render_card(card))
    return Path(target_dir)


def quantization_config(grid: str, group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """`config.json`'s `quantization_config`, built and checked by the library's own classes.

    Args:
        grid: `fp8_e4m3`, `fp8_e5m2`, `int8` or `int4`.
        group_size: columns a scale, for int4; None for one scale per output channel.
        ignore: names of the linear layers that stay as they are.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    scheme = preset_name_to_scheme(_PRESETS[grid], ["Linear"]).model_dump(exclude_none=True)
    scheme["format"] = _FORMATS[grid]
    if grid == "int4":
        grouped = {"strategy": "group", "group_size": group_size}
        scheme["weights"].update(grouped if group_size else {"strategy": "channel", "group_size": None})
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=_FORMATS[grid],
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {"version": compressed_tensors.__version__, **written}


def _left_alone(model_dir: str | Path, quantized: Mapping[str, Any]) -> list[str]:
    """Linear layers that stay as they are (`lm_head`): the scheme targets all others by their type."""
    model = meta_model(model_dir)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if strangers := sorted(set(quantized) - set(linears)):
        raise HwpqError(
            f"{strangers[0]} is no linear layer of the model",
            where=str(model_dir),
            remedy="Compress this model again: the compressed layers are of another one.",
        )
    return [name for name in linears if name not in quantized]


def _tensors(dense: Checkpoint, compressed: CompressedModel, scale_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The export's tensors by name, each made when it is asked for."""
    if lost := sorted(layer for layer in compressed.layers if f"{layer}.weight" not in dense):
        raise HwpqError(
            f"the dense model has no {lost[0]}.weight",
            where=str(dense.path),
            remedy="Compress this model again: the compressed layers are of another one.",
        )
    for name in dense.names:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in compressed.layers:
            yield name, dense.finite(name)
            continue
        shape = dense.shape(name)
        if layer in compressed.quantized:
            quantized = compressed.read_quantized(layer, shape)
            yield from _stored(layer, quantized, compressed.grid == "int4", scale_dtype)
        else:
            yield name, compressed.read_weight(layer, shape).to(dense.tensor(name).dtype)


def _stored(
    layer: str, quantized: QuantizedLayer, packed: bool, scale_dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if packed:
        yield f"{layer}.weight_packed", pack_to_int32(quantized.codes, num_bits=4)
        yield f"{layer}.weight_shape", torch.tensor(quantized.codes.shape, dtype=torch.int64)
    else:
        yield f"{layer}.weight", quantized.codes
    yield f"{layer}.weight_scale", quantized.scale.to(scale_dtype)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index when there is more than one."""
    shards: list[list[str]] = []
    total, held = 0, 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal held
        write_tensors(directory / f"shard-{len(shards)}", shard)
        shards.append(list(shard))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(directory / "shard-0", directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / f"shard-{number}", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence of a checkpoint."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
