"""The compressed-tensors checkpoint: what transformers and vLLM load today.

A quantized linear layer `w ≈ scale · code` is stored as

    grid                 tensors                                           activations      format
    fp8_e4m3, fp8_e5m2   weight float8_e4m3fn (out, in)                    fp8, per token   float-quantized
                         weight_scale (out, 1)
    int8                 weight int8 (out, in), weight_scale (out, 1)      int8, per token  int-quantized
    int4, int3, int2     weight_packed int32 (out, ⌈in·bits/32⌉ or more)   not quantized    pack-quantized
                         weight_scale (out, groups), weight_shape int64 (2)
    nvfp4                weight_packed uint8 (out, in/2)                   not quantized    nvfp4-pack-quantized
                         weight_scale float8_e4m3fn (out, in/16)
                         weight_global_scale float32 (1), a divisor
    mxfp4                weight_packed uint8 (out, in/2)                   not quantized    mxfp4-pack-quantized
                         weight_scale uint8 (out, in/32), 127 + exponent
    none                 weight (out, in) in the dense model's dtype       not quantized    plain checkpoint

Scales keep their values. They are stored in the dense model's dtype if every one of them is a number of that dtype,
else in float32, for the whole checkpoint alike. Rounding them here would move every weight of a channel by up to 2⁻⁹
of itself, after the codes have been chosen for the scale. Engines differ: vLLM keeps FP8 and INT8 scales in float32
and casts INT4 scales to the model's dtype; transformers casts all of them to the dtype that it loads in. So scales
that are bfloat16 numbers from the start are the same everywhere, and take half the bytes.

Rounded embeddings and heads have a scheme of their own, 8-bit codes with a scale a row. A head that is tied has no
codes: it shares those of the embedding, and has a copy of its scales (transformers unpacks each module by itself).
Gemma's embedding has a buffer, which is stored too: the library makes a parameter of it. vLLM 0.32 reads no codes of
embeddings.

Pruned weights are stored as zeros, dense, without a `sparsity_config`: engines have dropped the sparse formats and
refuse checkpoints that announce one. Everything outside the layers (embeddings, norms, `lm_head`) is copied as it is. A
tied `lm_head` has no tensor and gets none.

One shard's tensors are in memory at a time, since safetensors writes a file whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.buffers import compute_buffers
from hwpq_pipeline.checkpoints.compressed import CompressedModel, open_compressed
from hwpq_pipeline.checkpoints.layers import layer_map, meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.side_files import copy_side_files
from hwpq_pipeline.checkpoints.writer import SHARD_BYTES, write_json, write_weights
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.grids import GRIDS

from .card import CardInfo, Storage
from .formats import Format
from .stored_layers import StoredLayers, module_of

logger = logging.getLogger(__name__)

#: By grid: the library's preset for weights and activations, and its name for how the codes are stored.
_SCHEMES = {
    "fp8_e4m3": ("FP8_DYNAMIC", "float-quantized"),
    "fp8_e5m2": ("FP8_DYNAMIC", "float-quantized"),
    "int8": ("INT8", "int-quantized"),
    "int4": ("W4A16", "pack-quantized"),
    "int3": ("W4A16", "pack-quantized"),  # with its own number of bits
    "int2": ("W4A16", "pack-quantized"),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
}
_EXPONENT_BIAS = 127


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
        compressed_dir: the compressed model (`checkpoints.compressed`).
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.
        shard_bytes: largest size of a weight file; a larger tensor makes a file alone.

    Returns:
        `target_dir`. It loads with `AutoModelForCausalLM.from_pretrained` and no further argument.

    Raises:
        HwpqError: a damaged or incomplete input, or one that does not belong to the dense model.
    """
    dense, compressed = open_compressed(model_dir, compressed_dir)
    dense.check_dense()
    FORMAT.check(compressed.structure, compressed.grid, str(compressed_dir))
    stored = StoredLayers(layer_map(model_dir), compressed)
    _tell_of_values(stored, compressed.variant)
    config = dict(dense.config)
    if stored.packed or stored.tables:
        config["quantization_config"] = quantization_config(
            stored.schemes(), _left_alone(model_dir, stored), stored.table_schemes(), unpacked=stored.unpacked
        )
    with FORMAT.directory(dense, compressed, target_dir, card) as partial:
        write_json(partial / "config.json", config)
        write_weights(partial, _tensors(dense, compressed, stored), shard_bytes=shard_bytes)
        copy_side_files(Path(model_dir), partial)
    return Path(target_dir)


def _tell_of_values(stored: StoredLayers, variant: str) -> None:
    if stored.demoted:
        logger.warning(
            "%s: %d rounded layers are stored as values, first %s: transformers unpacks this model when it loads, by "
            "one grid. They take as many bytes as unrounded ones.", variant, len(stored.demoted), stored.demoted[0],
        )  # fmt: skip


def quantization_config(
    schemes: Mapping[tuple[str, int | None], list[str]],
    ignore: list[str],
    tables: Mapping[str, list[str]] | None = None,
    *,
    unpacked: bool = False,
) -> dict[str, Any]:
    """`config.json`'s `quantization_config`, built and checked by the library's own classes.

    Args:
        schemes: by grid (a name in `FORMAT.grids`) and group size (None for one scale per output channel): the modules
            that it is for, or `Linear` for all.
        ignore: names of the linear layers that stay as they are.
        tables: by grid: the embedding and the head, where they are rounded.
        unpacked: whether transformers must unpack the weights when it loads them. It rounds no activations then, so
            that the scheme names none, and every engine computes the same.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    made = [_scheme(grid, size, targets, activations=not unpacked) for (grid, size), targets in schemes.items()]
    made += [_scheme(grid, None, targets, activations=False) for grid, targets in (tables or {}).items()]
    formats = {scheme["format"] for scheme in made}
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(made)},
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {"version": compressed_tensors.__version__, **written} | ({"dequantize": True} if unpacked else {})


def _scheme(grid: str, group_size: int | None, targets: list[str], *, activations: bool) -> dict[str, Any]:
    from compressed_tensors.quantization import preset_name_to_scheme

    preset, stored_as = _SCHEMES[grid]
    scheme: dict[str, Any] = preset_name_to_scheme(preset, targets).model_dump(exclude_none=True)
    scheme["format"] = stored_as
    if GRIDS[grid].stored_as == "model":  # the others are fixed whole by their preset
        scheme["weights"]["num_bits"] = GRIDS[grid].bits
    if GRIDS[grid].group_sizes and GRIDS[grid].stored_as == "model":
        grouped = {"strategy": "group", "group_size": group_size}
        scheme["weights"].update(grouped if group_size else {"strategy": "channel", "group_size": None})
    if not activations:
        scheme.pop("input_activations", None)
    return scheme


def _left_alone(model_dir: str | Path, stored: StoredLayers) -> list[str]:
    """Linear layers that stay as they are (`lm_head`): the scheme targets all others by their type."""
    packed = {module_of(layer) for layer in (*stored.packed.values(), *stored.tables.values())}
    packed |= {module for modules in stored.tied.values() for module in modules}
    linears = [name for name, module in meta_model(model_dir).named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name not in packed]


def _tensors(dense: Checkpoint, compressed: CompressedModel, stored: StoredLayers) -> Iterator[tuple[str, Tensor]]:
    """The export's tensors by name, each made when it is asked for."""
    scale_dtype = compressed.scale_dtype(dense.torch_dtype)
    for name in dense.names:
        if name in stored.packed:
            layer = stored.packed[name]
            yield from _codes(layer.name, compressed.read_quantized(layer.name, layer.shape), scale_dtype)
            continue
        if name in stored.tables:
            table = stored.tables[name]
            quantized = compressed.read_quantized(table.name, table.shape)
            yield from _codes(table.name, quantized, scale_dtype)
            yield from _buffers(dense.path, module_of(table))
            for alias in stored.tied[name]:
                yield f"{alias}.weight_scale", quantized.scale.to(scale_dtype, copy=True)
            continue
        tensor = dense.finite(name)
        for layer in stored.valued.get(name, ()):
            layer.stored.of(tensor).copy_(compressed.dequantized(layer.name, layer.shape, tensor.dtype))
        yield name, tensor


def _buffers(model_dir: Path, module: str) -> Iterator[tuple[str, Tensor]]:
    """What transformers computes for a module and holds beside its weight."""
    model = meta_model(model_dir)
    if any(True for _ in model.get_submodule(module).buffers(recurse=False)):
        compute_buffers(model)
        for name, buffer in model.get_submodule(module).named_buffers(recurse=False):
            yield f"{module}.{name}", buffer


def _codes(layer: str, quantized: Quantized, scale_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid = GRIDS[quantized.grid]
    if grid.coarsening:
        yield from _four_bit_floats(layer, quantized)
        return
    if _SCHEMES[quantized.grid][1] == "pack-quantized":
        yield f"{layer}.weight_packed", pack_to_int32(quantized.codes, num_bits=grid.bits)
        yield f"{layer}.weight_shape", torch.tensor(quantized.codes.shape, dtype=torch.int64)
    else:
        yield f"{layer}.weight", quantized.codes
    yield f"{layer}.weight_scale", quantized.scale.to(scale_dtype)


def _four_bit_floats(layer: str, quantized: Quantized) -> Iterator[tuple[str, Tensor]]:
    """Codes are halves here and floats there, so that the scales there are twice ours."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    yield f"{layer}.weight_packed", pack_fp4_to_uint8(quantized.codes.float() / 2)
    if GRIDS[quantized.grid].stored_as == "e4m3":
        yield f"{layer}.weight_scale", (quantized.scale * quantized.tensor_scale).to(torch.float8_e4m3fn)
        yield f"{layer}.weight_global_scale", torch.tensor([quantized.tensor_scale / 2])
    else:
        yield f"{layer}.weight_scale", (torch.log2(2 * quantized.scale) + _EXPONENT_BIAS).to(torch.uint8)


#: transformers keeps the weights unpacked once they are used.
SAVED_AGAIN = (
    "\n\nTo pass it on, copy the directory. `save_pretrained` after a forward pass writes the weights unpacked: the "
    "same values in two to three times the bytes."
)


def _how_to_load(info: CardInfo) -> str:
    needs = "pip install transformers" + (" compressed-tensors" if info.grid or info.embeddings else "")
    vllm = "The layout is the one that vLLM reads too: `vllm serve path/to/this/directory`."
    if info.embeddings:
        vllm = "vLLM does not read rounded embeddings: use transformers, or the GGUF or ONNX export."
    return (
        f"```bash\n{needs}\n```\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        f"{vllm}"
    ) + (SAVED_AGAIN if info.grid else "")


STORAGE = Storage("compressed-tensors", "transformers", _how_to_load, plain_without_grid=True)
FORMAT = Format("compressed-tensors", export_checkpoint, STORAGE, None, grids=tuple(_SCHEMES))
