"""The packed 2:4 export: half of the weights are not there (`checkpoints.packed` has the files).

No engine reads a packed 2:4 form any more, so this one is the project's own. `hwpq_pipeline.runtime` loads it: on a CPU
with a kernel that decodes from the packed bytes, on a CUDA GPU into torch's semi-structured tensors. Everything besides
the 2:4 layers is copied. The scales keep their values, as in the compressed-tensors export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel, open_compressed
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.packed import pack_codes, pack_weight, write_packed
from hwpq_pipeline.checkpoints.packed_form import PACKABLE, PackedForm
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.side_files import copy_side_files
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.runtime import load_packed

from .card import CardInfo, Storage
from .comparison import Logits, ReadBack, exact, model_logits
from .formats import Format


def export_semi_structured(
    model_dir: str | Path, compressed_dir: str | Path, target_dir: str | Path, *, card: CardInfo | None = None
) -> Path:
    """Write the packed checkpoint of one 2:4 variant, whole or not at all.

    Args:
        model_dir: the dense checkpoint.
        compressed_dir: the compressed model, of structure `2of4`.
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.

    Returns:
        `target_dir`, which `hwpq_pipeline.runtime.load_packed` opens.

    Raises:
        HwpqError: a variant that is not 2:4, a damaged input, one that does not belong to the dense model, or an export
            that computes something else than the compressed-tensors export.
    """
    dense, compressed = open_compressed(model_dir, compressed_dir)
    FORMAT.check_all(compressed)
    for layer in layer_map(model_dir):
        if layer.name in compressed.layers and not (layer.packs and layer.called):
            raise HwpqError(
                "semi-structured packs layers that the model calls as modules of their own, and this is none",
                where=layer.name,
                remedy="Use another export format for this model.",
            )
    if 0 < len(compressed.quantized) < len(compressed.layers):
        raise HwpqError(
            "semi-structured holds layers of one kind, and some of these are rounded and others are not",
            where=str(compressed.path),
            remedy="Use another export format for this variant.",
        )
    with FORMAT.directory(dense, compressed, target_dir, card) as partial:
        tensors = dict(_tensors(dense, compressed))
        write_packed(partial, dense.config, _form(compressed, tensors), tensors)
        copy_side_files(Path(model_dir), partial)
    return Path(target_dir)


def _form(compressed: CompressedModel, tensors: Mapping[str, Tensor]) -> PackedForm:
    """What the tensors are; all packed layers are of one kind."""
    layer, tables = min(compressed.layers), tuple(sorted(compressed.embeddings))
    scale = tensors.get(f"{layer}.weight_scale")
    grid, group_size = compressed.format_of(layer) if layer in compressed.quantized else (None, None)
    return PackedForm(
        layers=tuple(sorted(compressed.layers)),
        kept_dtype=_name(tensors[f"{layer}.weight_kept"]),
        scale_dtype=None if scale is None else _name(scale),
        group_size=group_size,
        grid=grid,
        tables=tables,
        table_dtype=_name(tensors[f"{tables[0]}.weight"]) if tables else None,
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(dense: Checkpoint, compressed: CompressedModel) -> Iterator[tuple[str, Tensor]]:
    scale_dtype = compressed.scale_dtype(dense.torch_dtype)
    for name in dense.names:
        layer = name.removesuffix(".weight")
        if layer in compressed.embeddings:
            table = compressed.read_quantized(layer, dense.shape(name))
            yield from ((name, table.codes), (f"{layer}.weight_scale", table.scale.to(scale_dtype)))
            continue
        if layer == name or layer not in compressed.layers:
            yield name, dense.finite(name)
            continue
        shape, where = dense.shape(name), f"{compressed.path}: {layer}"
        if layer in compressed.quantized:
            quantized = compressed.read_quantized(layer, shape)
            yield from pack_codes(layer, quantized, scale_dtype, where=where).items()
        else:
            weight = compressed.read_weight(layer, shape)
            yield from pack_weight(layer, weight, dense.torch_dtype, where=where).items()


def _open(folder: Path) -> Logits:
    return model_logits(load_packed(folder))


def _how_to_load(_info: CardInfo) -> str:
    return (
        "vLLM serves it with this project's plugin (docs/engines.md); no other engine reads it.\n\n"
        "```bash\npip install .   # in a checkout of hwpq-pipeline\n```\n\n```python\n"
        "from hwpq_pipeline.runtime import load_packed\n"
        "from transformers import AutoTokenizer\n\n"
        'model = load_packed("path/to/this/directory")   # on the CPU\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        "The zeros are not stored: of every four weights there are two values and their places."
    )


STORAGE = Storage("semi-structured", "hwpq-pipeline", _how_to_load, stores_zeros=False)
FORMAT = Format("semi-structured", export_semi_structured, STORAGE, ReadBack(_open, exact), PACKABLE, ("2of4",))
