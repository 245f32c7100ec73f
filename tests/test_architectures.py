"""Every architecture from the fetched files to the export, against transformers itself.

What an export should compute is made without the code under test: the compressed values `scale · code` are put into
copies of the dense checkpoint's own files, by the layers' names, and transformers loads those.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.sources import copy_checkpoint
from hwpq_pipeline.evaluation.loading import open_blockwise, open_model, run_blockwise
from hwpq_pipeline.evaluation.size import measure_size
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.method.fitting import misfits
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from tests.architectures import ARCHITECTURES, save_checkpoint
from tests.tiny import tiny_tokenizer, tiny_tokens

TOKENS = tiny_tokens(8, 48)
NAMES = [*ARCHITECTURES, "gemma3_vision"]
#: A few of each kind, for every run of the suite: a plain one, norms before the stream, transposed weights, experts in
#: tensors of their own, stacked experts, a subclass of `nn.Linear`, a recurrence, a wrapper with a tower.
SHORT = ("llama_gqa_bias", "gemma2", "gpt2", "phimoe", "gpt_oss", "falcon", "jamba", "gemma3_vision")
#: What may stay dense in these tiny models, where it is over a hundredth of the block weights.
DENSE = {
    "jamba": r"mamba\.(A_log|conv1d)|router",
    "mamba": r"mixer\.(A_log|conv1d)",
    "mamba2": r"mixer\.conv1d",
    "recurrent_gemma": r"rg_lru\.\w+_gate_weight|conv_1d",
    "gemma3n_text": r"laurel\.linear_right|per_layer_projection|altup",
}
SPARSE = {"selection": {"structure": "2of4"}, "quantization": {"grid": "int4", "group_size": 32}}


def as_named(dense: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The layer's matrix in the files' tensors, (out, in) or (in, out), by its name alone."""
    if f"{name}.weight" in dense:
        return dense[f"{name}.weight"]
    stack, _, part = name.rpartition(".")
    tensor = dense.get(stack, dense.get(f"{stack}.weight"))
    assert tensor is not None
    return tensor[int(part)] if tensor.ndim == 3 else tensor.chunk(4)[int(part)]  # 4 experts


def expected_model(root: Path, compressed: Path) -> None:
    """Write the dense checkpoint with the compressed values in it."""
    dense = load_file(root / "model" / "model.safetensors")
    values: dict[str, torch.Tensor] = {}
    for file in compressed.glob("*.safetensors"):
        values |= load_file(file)
    for layer in layer_map(root / "model"):
        codes, scale = values[f"{layer.name}.codes"].float(), values[f"{layer.name}.scale"].float()
        weight = (codes.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
        place = as_named(dense, layer.name)
        place.copy_(weight.T if layer.stored.transposed else weight)
    for table in CompressedModel(compressed).embeddings:
        dense[f"{table}.weight"] = values[f"{table}.codes"].float() * values[f"{table}.scale"]
    target = root / "expected"
    target.mkdir(exist_ok=True)
    save_file(dense, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((root / "model" / "config.json").read_bytes())


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def fetched(name: str, roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fetched model of the architecture with its statistics, made once."""
    if name not in roots:
        root = roots[name] = tmp_path_factory.mktemp(name)
        save_checkpoint(name, root / "source")
        tiny_tokenizer(root / "source")
        (root / "model").mkdir()
        copy_checkpoint(root / "source", root / "model", torch.float32)
        collect_statistics(root / "model", TOKENS, target=root / "statistics", dtype="float32")
    return roots[name]


def logits(directory: Path) -> torch.Tensor:
    """What a user gets: `from_pretrained`, and the logits of some tokens. A block at a time gives the same."""
    model = open_model(directory, "float32", TOKENS)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS[:2], use_cache=False).logits
        head, states = run_blockwise(open_blockwise(directory, "float32", TOKENS), TOKENS[:2], 1)
        judged = head.logits(torch.cat(list(states)))
    assert torch.allclose(judged, found, atol=2e-4 * float(found.abs().max() + 1))
    return found


@pytest.mark.parametrize("preset", ["fast", "quality"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.architectures) for name in NAMES]
)
def test_what_is_exported_is_what_was_compressed(
    name: str, preset: str, roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = fetched(name, roots, tmp_path_factory)
    recipe = Recipe.from_variant({**SPARSE, "recovery": {"preset": preset}})
    compressed, export = root / f"compressed-{preset}", root / f"export-{preset}"
    compressed.mkdir()
    facts: Any = write_model(root / "model", root / "statistics", recipe, compressed, name=name, tokens=TOKENS)
    export_checkpoint(root / "model", compressed, export)
    expected_model(root, compressed)
    wanted, found = logits(root / "expected"), logits(export)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    # Every layer is 2:4 sparse, and reached.
    layers = layer_map(root / "model")
    assert facts.keys() == set(layers.names)
    assert all(fact["reached_sparsity"] == 0.5 for fact in facts.values())
    # What is left dense is told by name.
    size = measure_size(export, root / "model")
    left = [line for line in size.left_dense if name not in DENSE or not re.search(DENSE[name], line)]
    assert size.coverage >= 0.99 or (name in DENSE and not left), size.left_dense
    assert size.sparsity >= 0.49 * size.coverage
    # What is no layer is there to the byte.
    dense, stored = (load_file(root / place / "model.safetensors") for place in ("model", export.name))
    inside = {layer.stored.tensor for layer in layers}
    for tensor in dense.keys() - inside:
        assert dense[tensor].dtype == stored[tensor].dtype
        assert torch.equal(dense[tensor], stored[tensor])


#: Models that transformers would have to unpack by two grids when it loads them, and one that it rebuilds.
WITHOUT_TABLES = {
    "falcon", "falcon_alibi", "bloom", "qwen2_moe", "granitemoehybrid", "jamba", "mamba", "mamba2", "mixtral", "phimoe",
    "recurrent_gemma", "rwkv", "olmoe", "deepseek_v3", "qwen3_moe", "gpt_bigcode", "llama4_text",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.architectures) for name in NAMES]
)
def test_embeddings_and_head_are_rounded_and_read_back(
    name: str, roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = fetched(name, roots, tmp_path_factory)
    recipe = Recipe.from_variant({"quantization": {"grid": "int4", "group_size": 32, "embeddings": "int8"}})
    layers = layer_map(root / "model")
    refused = misfits(recipe, layers, name)
    assert bool(refused) == (name in WITHOUT_TABLES), refused
    if refused:
        return
    compressed, export = root / "compressed-tables", root / "export-tables"
    compressed.mkdir()
    write_model(root / "model", None, recipe, compressed, name=name)
    export_checkpoint(root / "model", compressed, export)
    expected_model(root, compressed)
    wanted, found = logits(root / "expected"), logits(export)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    stored = load_file(export / "model.safetensors")
    for table in layers.tables:
        assert stored[table.stored.tensor].dtype == torch.int8
