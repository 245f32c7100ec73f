"""The GGUF file: what llama.cpp, Ollama and LM Studio load. Weights, tokenizer and chat template are in one file.

GGUF's types hold blocks of 32 neighbouring weights of a row, each block with a float16 scale `d`:

    grid               type    a block                       bits    what becomes of `scale · code`
    int4               Q4_0    d, 32 × (q − 8), q 0 … 15     4.5     codes −8 … 7 as they are, `d = scale`
    int8               Q8_0    d, 32 × q, q −128 … 127       8.5     codes as they are, `d = scale`
    mxfp4              MXFP4   e, 32 × q, q in halves        4.25    codes as they are, `2ᵉ⁻¹²⁸ = scale`
    fp8_e4m3, fp8_e5m2 Q8_0    d, 32 × q, q −128 … 127       8.5     rounded again: `d = max|w| / 127` of the block
    none               F16     no blocks                     16      weights with float16's precision
    any, `gguf-f16`    F16     no blocks                     16      `scale · code` with float16's precision

Groups of 32, 64 and 128 columns, and whole rows, are whole blocks. So INT4 and INT8 keep every code, and the blocks of
one group repeat its scale. (Q4_1 adds a minimum to each block. It would hold the same numbers in 5 bits; the grids here
are symmetric and do not need it.) The compression chooses scales that are bfloat16 numbers. From 2⁻¹⁷ up these are
float16 numbers too; below, they are off by 2⁻²⁵ at most. Other scales are rounded to 11 bits.

GGUF has no 8-bit floats. An FP8 code has 4 significant bits, so FP8 moves a weight by at most |w|/16. Q8_0 has steps
of m/127 in a block whose largest weight is m, so the second rounding moves a weight by at most m/254. That is less
than the first one, except for weights below m/16. `gguf-f16` avoids it at twice the bytes. A GGUF file does not say
how activations are rounded: llama.cpp rounds them to 8 bits for each block of 32, whatever the weights.

Layers may have several types. An embedding and a head that the variant rounds are Q8_0. Everything else is copied: an
embedding and a head in 16 bits as F16 (bfloat16 weights are float16 numbers within 2⁻²⁵), norms and biases as F32.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of queries and keys, and their
biases, are put in its order. Rows move whole, and no code changes.

Rope scaling, as llama.cpp's own converter writes it:

    linear     `rope.scaling.type` and `rope.scaling.factor`
    llama3     `rope_freqs.weight`, by which each frequency is divided: transformers' frequency without the scaling
               over the one with it

Others are refused. `dynamic` and `longrope` depend on the prompt's length. llama.cpp has `yarn`, but how it scales the
attention with it has changed between its releases.

The architecture is `llama`. One tensor at a time is in memory while the file is written. Then it is read back and
compared (`gguf_reading`). Its bound is a few times what rounding does to tiny random models, whose logits move most:

    Q4_0, Q8_0 of integer grids    exact where the scales and the dense weights are bfloat16; else 11 bits
    F16                            11 bits, where the compressed-tensors export has bfloat16's 8
    Q8_0 of FP8                    steps of 1/127 of a block's largest weight
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwpq_pipeline.checkpoints.compressed import CompressedModel, open_compressed
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError

from .card import CardInfo, Storage
from .comparison import EXACT, ReadBack
from .formats import Format
from .gguf_blocks import BLOCK, BLOCK_BYTES, Array, as_blocks, as_float16, interleaved
from .gguf_metadata import add_description, add_shape, rope_factors
from .gguf_reading import open_gguf
from .gguf_tokenizer import add_tokenizer
from .llama import USE_ANOTHER, LlamaShape, read_llama

#: Bounds of the comparison: weights with 11 significant bits beside bfloat16's 8, and FP8 rounded to Q8_0.
ELEVEN_BITS, ROUNDED_AGAIN = 0.02, 0.2
_TYPES = {"int4": "Q4_0", "int8": "Q8_0", "mxfp4": "MXFP4", "fp8_e4m3": "Q8_0", "fp8_e5m2": "Q8_0"}
#: Rope types that llama.cpp's header holds.
_ROPES = ("default", "linear", "llama3")
#: Old checkpoints store what transformers computes from the config.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class _Model:
    """What the tensors are made from: both sources, the type of most compressed layers, and the shape."""

    dense: Checkpoint
    compressed: CompressedModel
    type: str
    shape: LlamaShape

    def in_codes(self, name: str) -> bool:
        """Whether the compressed model has codes for a tensor."""
        layer = name.removesuffix(".weight")
        return layer in self.compressed.quantized or layer in self.compressed.embeddings


def export_gguf(
    model_dir: str | Path,
    compressed_dir: str | Path,
    target_dir: str | Path,
    *,
    card: CardInfo | None = None,
    float16: bool = False,
) -> Path:
    """Write a directory with one variant's GGUF file, whole or not at all.

    Args:
        model_dir: the dense checkpoint, with its tokenizer.
        compressed_dir: the compressed model (`checkpoints.compressed`).
        target_dir: replaced when the new one is complete; the file in it is `model-<type>.gguf`.
        card: what the model card says; without it the directory gets none.
        float16: whether every weight is stored as F16, and not as the type of its grid.

    Returns:
        `target_dir`.

    Raises:
        HwpqError: an architecture, a tokenizer or a group size that this module does not write, a damaged input, or a
            file that computes something else than the compressed-tensors export.
    """
    dense, compressed = open_compressed(model_dir, compressed_dir)
    made = FLOAT16 if float16 else FORMAT
    made.check_all(compressed)
    shape = read_llama(dense, "GGUF", _ROPES)
    kind = "F16" if float16 or compressed.grid is None else _TYPES[compressed.grid]
    if not float16:
        _check_groups(dense, compressed)
    model = _Model(dense, compressed, kind, shape)
    with made.directory(dense, compressed, target_dir, card) as folder:
        _write_file(folder / f"model-{kind}.gguf", model, card)
    return Path(target_dir)


def _check_groups(dense: Checkpoint, compressed: CompressedModel) -> None:
    for layer in (*compressed.quantized, *compressed.embeddings):
        columns = dense.shape(f"{layer}.weight")[1]
        group = compressed.format_of(layer)[1] or 0
        if columns % BLOCK or group % BLOCK:
            raise HwpqError(
                f"{columns} columns in groups of {group or columns} are not whole blocks of {BLOCK}",
                where=f"{compressed.path}: {layer}",
                remedy="Use group_size 32, 64 or 128, or the format gguf-f16.",
            )


def _write_file(path: Path, model: _Model, card: CardInfo | None) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    try:
        add_description(writer, model.type, card)
        add_shape(writer, model.shape)
        add_tokenizer(writer, model.dense.path, model.shape.vocabulary)
        for name, target in _names(model).items():
            _announce(writer, model, name, target)
        factors = rope_factors(model.shape.rope)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _arrays(model):
            writer.write_tensor_data(array)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()


def _names(model: _Model) -> dict[str, str]:
    """GGUF's name for every tensor of the dense checkpoint, in a fixed order."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH.LLAMA, model.shape.blocks)
    names = {}
    for name in model.dense.names:
        if name.endswith(_COMPUTED):
            continue
        target = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise HwpqError(
                f"GGUF's llama has no place for tensor {name}",
                where=str(model.dense.path),
                remedy=USE_ANOTHER,
            )
        names[name] = target
    return names


def _stored_type(model: _Model, name: str) -> str:
    if len(model.dense.shape(name)) == 1:
        return "F32"
    if model.type == "F16" or not model.in_codes(name):
        return "F16"
    return _TYPES[model.compressed.format_of(name.removesuffix(".weight"))[0]]


def _announce(writer: Any, model: _Model, name: str, target: str) -> None:
    from gguf import GGMLQuantizationType

    shape, kind = model.dense.shape(name), _stored_type(model, name)
    stored: tuple[int, ...] = shape
    dtype: np.dtype[Any] = np.dtype(np.float32 if kind == "F32" else np.float16)
    if kind in BLOCK_BYTES:
        stored = (shape[0], shape[1] // BLOCK * BLOCK_BYTES[kind])
        dtype = np.dtype(np.uint8)
    nbytes = int(np.prod(stored)) * dtype.itemsize
    writer.add_tensor_info(target, stored, dtype, nbytes, raw_dtype=GGMLQuantizationType[kind])


def _arrays(model: _Model) -> Iterator[Array]:
    """The tensors' bytes, in the order they were announced."""
    for name in _names(model):
        layer, shape, where = name.removesuffix(".weight"), model.dense.shape(name), f"{model.dense.path}: {name}"
        kind = _stored_type(model, name)
        heads = {"q_proj": model.shape.heads, "k_proj": model.shape.key_heads}.get(name.split(".")[-2])
        if model.in_codes(name):
            read = model.compressed.read_quantized(layer, shape)
            moved = replace(read, codes=interleaved(read.codes, heads), scale=interleaved(read.scale, heads))
            yield as_blocks(moved, kind, where)
            continue
        weight = (
            model.compressed.read_weight(layer, shape) if layer in model.compressed.layers else model.dense.finite(name)
        )
        moved_rows = interleaved(weight, heads)
        yield moved_rows.float().numpy() if kind == "F32" else as_float16(moved_rows, where)


def _bound(dense: Checkpoint, compressed: CompressedModel) -> float:
    """Of the format `gguf`."""
    if compressed.grid is None:
        return ELEVEN_BITS
    grids = {*(grid for grid, _ in compressed.formats), *compressed.embeddings.values()}
    if any(GRIDS[grid].is_float for grid in grids):
        return ROUNDED_AGAIN
    kept = dense.torch_dtype == compressed.scale_dtype(torch.bfloat16) == torch.bfloat16
    return EXACT if kept else ELEVEN_BITS


def _how_to_load(info: CardInfo) -> str:
    rounded = (
        "\n\nGGUF has no 8-bit floats: the weights are those of the FP8 variant rounded once more to Q8_0 (steps of "
        "1/127 of the largest of 32), or kept as F16; the file's name says which."
        if info.grid and GRIDS[info.grid].is_float
        else ""
    )
    return (
        "```bash\nllama-cli -m path/to/this/directory/model-*.gguf            # llama.cpp\n"
        'echo "FROM ./path/to/this/directory/model-<type>.gguf" > Modelfile  # Ollama\n'
        "ollama create my-model -f Modelfile && ollama run my-model\n```\n\n"
        "Tokenizer and chat template are in the file. llama.cpp rounds activations in its own way, whatever the "
        f"variant says of them.{rounded}"
    )


STORAGE = Storage("gguf", "gguf", _how_to_load)
FORMAT = Format("gguf", export_gguf, STORAGE, ReadBack(open_gguf, _bound), grids=tuple(_TYPES), mixes=True)
FLOAT16 = Format(
    "gguf-f16",
    partial(export_gguf, float16=True),
    STORAGE,
    ReadBack(open_gguf, lambda _dense, _made: ELEVEN_BITS),
    mixes=True,
)
