"""Size and sparsity against counts made by hand from the codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.size import exported_weight, measure_size, quantization_schemes
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from tests.beyond_linear import gpt_oss
from tests.export.making import layer_shapes, make_compressed
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer

# Rows and columns of a block's layers at hidden 256, feed-forward 512, 2 of 4 heads for keys and values.
WIDE = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}  # fmt: skip
GRIDS = [("fp8_e4m3", None), ("int8", None), ("int4", 16), ("nvfp4", 16), (None, None)]
WEIGHTS = 256 * 256 * 2 + 128 * 256 * 2 + 512 * 256 * 3
ROWS = 256 * 3 + 128 * 2 + 512 * 2


def test_bytes_are_the_arithmetic_within_three_percent(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", tiny_config(hidden_size=256, intermediate_size=512), dtype=torch.bfloat16)
    shapes = {f"model.layers.{block}.{name}": shape for block in range(2) for name, shape in WIDE.items()}
    others = 2 * (260 * 256 + 5 * 256)  # embeddings, five norms, bfloat16
    wanted = {
        ("fp8_e4m3", None): others + 2 * (WEIGHTS + 4 * ROWS),
        ("int8", None): others + 2 * (WEIGHTS + 4 * ROWS),
        ("nvfp4", 16): others + 2 * (WEIGHTS // 2 + WEIGHTS // 16 + 7 * 4),
        ("mxfp4", 32): others + 2 * (WEIGHTS // 2 + WEIGHTS // 32),
        ("int4", 64): others + 2 * (WEIGHTS // 2 + 4 * WEIGHTS // 64 + 7 * 16),
    }
    for (grid, group_size), expected in wanted.items():
        compressed = tmp_path / f"{grid}-compressed"
        make_compressed(compressed, grid, group_size=group_size, shapes=shapes)
        directory = export_checkpoint(tmp_path / "model", compressed, tmp_path / grid)
        size = measure_size(directory, tmp_path / "model")
        assert size.expected_bytes == expected
        assert size.size_bytes == (directory / "model.safetensors").stat().st_size
        assert size.size_bytes == pytest.approx(expected, rel=0.03)
        dense_bytes = (tmp_path / "model" / "model.safetensors").stat().st_size
        assert size.dense_bytes == dense_bytes
        assert size.compression_ratio == pytest.approx(dense_bytes / size.size_bytes)


@pytest.mark.parametrize(("grid", "group_size"), GRIDS)
def test_sparsity_counts_zeros_of_the_loaded_weights(tmp_path: Path, grid: str | None, group_size: int | None) -> None:
    tiny_checkpoint(tmp_path / "model")
    structure = "dense" if grid else "unstructured"
    weights = make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure)
    directory = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    size = measure_size(directory, tmp_path / "model")
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert size.weights == sum(weight.size for weight in weights.values())
    assert 0.3 < size.sparsity < 0.6
    assert size.sparsity == zeros / size.weights


@pytest.mark.parametrize(("grid", "group_size"), GRIDS)
def test_coverage_is_whole_where_every_matrix_of_the_blocks_is_linear(
    tmp_path: Path, grid: str | None, group_size: int | None
) -> None:
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    structure = "dense" if grid else "unstructured"
    make_compressed(tmp_path / "compressed", grid, group_size=group_size, structure=structure)
    export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    size = measure_size(tmp_path / "export", tmp_path / "model")
    assert (size.coverage, size.left_dense) == (1.0, [])


@pytest.mark.parametrize("grid", ["fp8_e4m3", None])
def test_coverage_counts_layers_that_were_left_out(tmp_path: Path, grid: str | None) -> None:
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    shapes = {name: shape for name, shape in layer_shapes().items() if "down_proj" not in name}
    make_compressed(tmp_path / "compressed", grid, structure="dense" if grid else "unstructured", shapes=shapes)
    export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    size = measure_size(tmp_path / "export", tmp_path / "model")
    every = sum(rows * columns for rows, columns in layer_shapes().values())
    assert size.coverage == 1 - 2 * 32 * 64 / every
    (line,) = size.left_dense
    assert line == f"model.layers.*.mlp.down_proj: left as in the dense model, {4096 / every:.1%} of the block weights"


def test_coverage_counts_fused_experts(tmp_path: Path) -> None:
    """Attention alone is linear in GPT-OSS: its share by the real model's parameters, and zeros over all of them."""
    model = tiny_model(gpt_oss())
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    linear = {
        name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)
    }
    shapes = {f"model.layers.{name}": (module.out_features, module.in_features) for name, module in linear.items()}
    weights = make_compressed(tmp_path / "compressed", "int8", shapes=shapes)
    export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    every = sum(
        parameter.numel()
        for name, parameter in model.model.layers.named_parameters()
        if parameter.dim() > 1 and "bias" not in name
    )
    compressed = sum(rows * columns for rows, columns in shapes.values())
    size = measure_size(tmp_path / "export", tmp_path / "model")
    assert size.coverage == compressed / every < 0.12
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert size.sparsity == zeros / every < 0.05
    assert size.model_sparsity == zeros / sum(parameter.numel() for parameter in model.parameters())
    assert [line.partition(":")[0] for line in size.left_dense] == [
        "model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.router",
    ]  # fmt: skip


def test_exported_weight_is_scale_times_code_where_scales_are_short(tmp_path: Path) -> None:
    """Scales stored in bfloat16 must not make the product bfloat16."""
    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    weights = make_compressed(tmp_path / "compressed", "int4", group_size=16, bfloat16_scales=True)
    directory = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    stored = load_file(directory / "model.safetensors")

    export = Checkpoint(directory)
    for layer in layer_map(tmp_path / "model"):
        assert stored[f"{layer.name}.weight_scale"].dtype == torch.bfloat16
        found = exported_weight(export, layer, quantization_schemes(export))
        np.testing.assert_array_equal(found.double().numpy(), weights[layer.name])


def test_a_dense_export_is_as_large_as_its_model(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    make_compressed(tmp_path / "compressed", None)
    directory = export_checkpoint(tmp_path / "model", tmp_path / "compressed", tmp_path / "export")
    size = measure_size(directory, tmp_path / "model")
    assert size.compression_ratio == pytest.approx(1, abs=0.01)
    assert (size.sparsity, size.coverage, size.left_dense) == (0, 0, [])
    assert size.weights == sum(rows * columns for rows, columns in layer_shapes().values())


def test_exports_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    tiny_checkpoint(tmp_path / "wider", tiny_config(intermediate_size=96))
    with pytest.raises(HwpqError, match="gate_proj: weight has shape"):
        measure_size(tmp_path / "wider", tmp_path / "model")
