"""Size of an export: bytes on disk, how many times smaller than the dense model, coverage, share of zero weights.

`size_bytes` counts the safetensors files, which users download and engines read into memory. Tokenizer, config and card
are left out: they are the same in every variant. Embeddings are counted, rounded or not. In a small model they are a
large part (SmolLM2-135M: 56.6 of 269 MB), and the ratio shows it.

`expected_bytes` is the arithmetic: for each quantized layer its codes (fewer than 8 bits are packed in words of 32)
and a scale for each row or group (and 16 bytes of shape or 4 of a tensor's scale, where there is one), and the dense
bytes of everything else. Only the files' headers are missing.

Coverage and sparsity are shares of the block weights (`checkpoints.block_weights`), which count what no method reaches
as well. A weight counts as compressed if its layer is stored in codes, or differs from the dense model's. Sparsity
counts zeros as loaded. A weight is zero if `scale · code` is, whether it was pruned or rounded to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hwpq_pipeline.checkpoints.block_weights import block_weights, told_left_dense
from hwpq_pipeline.checkpoints.layers import Layer, LayerMap, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError, reading


@dataclass(frozen=True)
class Size:
    """What `measure_size` found.

    Attributes:
        coverage: share of the block weights that were pruned or rounded, 0 to 1.
        sparsity: share of zeros among the block weights, 0 to 1.
        model_sparsity: the same zeros as a share of the whole model's weights, embeddings and head included.
        size_bytes: of the export's safetensors files.
        dense_bytes: of the dense checkpoint's.
        compression_ratio: dense_bytes / size_bytes.
        weights: number of block weights.
        expected_bytes: what the arithmetic gives for `size_bytes`, headers left out.
        left_dense: what was left dense and why, a line for each kind of weight; empty where nothing was compressed.
    """

    coverage: float
    sparsity: float
    model_sparsity: float
    size_bytes: int
    dense_bytes: int
    compression_ratio: float
    weights: int
    expected_bytes: int
    left_dense: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """What `metrics.json` holds of it, by name."""
        others = ("model_sparsity", "weights", "expected_bytes", "left_dense")
        return {name: value for name, value in asdict(self).items() if name not in others}


def measure_size(export_dir: str | Path, model_dir: str | Path) -> Size:
    """Measure an export beside its dense model, reading a tensor at a time.

    Args:
        export_dir: the export.
        model_dir: the dense checkpoint.

    Raises:
        HwpqError: one of them is missing or corrupt, or they belong to two models.
    """
    export, dense, layers = Checkpoint(export_dir), Checkpoint(model_dir), layer_map(model_dir)
    schemes = quantization_schemes(export)
    shapes = block_weights(dense, layers)
    zeros = compressed = 0
    left = {}
    for name, weight in _exported_blocks(export, layers, shapes, schemes):
        zeros += weight.numel() - int(weight.count_nonzero())
        if f"{name}_scale" in export or not _equal(weight, dense.tensor(name)):
            compressed += weight.numel()
        else:
            left[name] = shapes[name]
    weights = sum(map(prod, shapes.values()))
    return Size(
        size_bytes=export.size_bytes,
        dense_bytes=dense.size_bytes,
        compression_ratio=dense.size_bytes / export.size_bytes,
        coverage=compressed / weights,
        sparsity=zeros / weights,
        model_sparsity=zeros / sum(prod(dense.shape(name)) for name in dense.names),
        weights=weights,
        expected_bytes=_expected_bytes(export, dense, layers, schemes),
        left_dense=told_left_dense(left, shapes, layers) if compressed else [],
    )


def _exported_blocks(
    export: Checkpoint, layers: LayerMap, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Every block weight of the export as loaded, by the dense tensor's name.

    Args:
        export: the export.
        layers: the compressible layers.
        shapes: of the dense model's block weights.
        schemes: the export's quantization schemes, by the modules that they are for.

    Raises:
        HwpqError: one is missing, or has another shape than the dense model's.
    """
    compressible = {layer.stored.tensor: layer for layer in layers if layer.packs}
    for name in [*compressible, *sorted(shapes.keys() - compressible.keys())]:
        layer = compressible.get(name)
        weight = export.tensor(name) if layer is None else exported_weight(export, layer, schemes)
        if tuple(weight.shape) != shapes.get(name):
            raise HwpqError(
                f"weight has shape {tuple(weight.shape)}, the dense model's {shapes.get(name)}",
                where=f"{export.path}: {name.removesuffix('.weight')}",
                remedy="Export this model's variant again.",
            )
        yield name, weight


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all numbers are the same, each in its own dtype."""
    return bool((one == other).all())


def exported_weight(export: Checkpoint, layer: Layer, schemes: Mapping[str, Any]) -> Tensor:
    """A layer's weight as an engine sees it, shape (out, in); compressed-tensors itself unpacks it.

    Args:
        export: the export.
        layer: the layer.
        schemes: of the export (`quantization_schemes`).
    """
    name = layer.name
    scheme = scheme_of(layer, schemes)
    if scheme is None or f"{name}.weight_scale" not in export:
        return export.tensor(f"{name}.weight")
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored = {part: export.tensor(f"{name}.{part}") for part in compressor.compression_param_names(scheme)}
    stored["weight_scale"] = stored["weight_scale"].float()
    weight: Tensor = compressor.decompress(stored, scheme)["weight"]
    return weight


def quantization_schemes(export: Checkpoint) -> dict[str, Any]:
    """The quantization schemes of an export by the modules that they are for, or by `Linear`; none if it has none.

    Raises:
        HwpqError: the config holds no such schemes.
    """
    written = export.config.get("quantization_config")
    if written is None:
        return {}
    from compressed_tensors.quantization import QuantizationConfig

    with reading(f"{export.path}/config.json", what="no compressed-tensors scheme", remedy="Run the export again."):
        config = QuantizationConfig.model_validate(written)
        return {
            target: scheme.model_copy(update={"format": scheme.format or config.format})
            for scheme in config.config_groups.values()
            for target in scheme.targets
        }


def scheme_of(layer: Layer, schemes: Mapping[str, Any]) -> Any:
    """A layer's scheme, or None."""
    return schemes.get(layer.place.tensor.removesuffix(".weight"), schemes.get("Linear"))


def _expected_bytes(export: Checkpoint, dense: Checkpoint, layers: LayerMap, schemes: Mapping[str, Any]) -> int:
    total = sum(dense.tensor(name).nbytes for name in dense.names)
    for layer in (*layers, *layers.tables):
        if not layer.packs or f"{layer.name}.weight_scale" not in export:
            continue
        rows, columns = layer.shape
        weights, scale = scheme_of(layer, schemes).weights, export.tensor(f"{layer.name}.weight_scale")
        grid = next(grid for grid in GRIDS.values() if grid.bits == weights.num_bits)  # a code takes as many in each
        further = [f"{layer.name}.{part}" for part in ("weight_shape", "weight_global_scale")]
        total -= dense.tensor(f"{layer.name}.weight").nbytes
        total += grid.bytes_of(rows, columns, weights.group_size, scale.element_size())
        total += sum(export.tensor(name).nbytes for name in further if name in export)
        aliases = [alias for alias, original in layers.tied.items() if original == layer.place.tensor]
        total += len(aliases) * scale.nbytes  # a tied head has scales of its own
    return total
