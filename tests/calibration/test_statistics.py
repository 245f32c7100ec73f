from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens


def brute_force(path: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Every linear layer's Σ x xᵀ in float64, from one plain forward pass of a float64 model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    inputs: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2).numpy())
            )
    with torch.inference_mode():
        model(tokens)
    return {name: np.sum([np.outer(x, x) for part in parts for x in part], axis=0) for name, parts in inputs.items()}


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - expected).max() / np.abs(expected).max())


def cpu(path: Path, tokens: torch.Tensor, target: Path, **options: Any) -> Statistics:
    collect_statistics(path, tokens, target=target, device="cpu", **{"dtype": "float32", **options})
    return Statistics(target)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, np.ndarray]:
    return brute_force(model, tiny_tokens(5))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_grams_of_all_layers(model: Path, expected: dict[str, np.ndarray], tmp_path: Path, batch: int) -> None:
    """Five samples in batches of two: the last batch is smaller."""
    found = cpu(model, tiny_tokens(5), tmp_path / "s", batch=batch)
    assert set(found.layers) == set(expected)
    assert found.tokens == 5 * 24
    for layer, gram in expected.items():
        stored = found.gram(found.group_of(layer))
        assert stored.dtype == torch.float32
        assert torch.equal(stored, stored.T)
        assert relative(stored, gram) < 1e-5, layer
        assert relative(found.energy(layer), gram.diagonal()) < 1e-5, layer


@pytest.mark.parametrize("features", [1, 511, 513, 1030])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_panels_of_odd_sizes(features: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, features, generator=generator).to(dtype) for rows in (3, 1)]
    gram = Gram(features, torch.device("cpu"))
    for part in parts:
        gram.add(part)
    rows = torch.cat(parts).double().numpy()
    assert relative(gram.result(), np.einsum("ti,tj->ij", rows, rows)) < tolerance
    assert torch.equal(gram.result(), gram.result().T)


def test_groups_and_files_are_as_documented(model: Path, tmp_path: Path) -> None:
    found = cpu(model, tiny_tokens(), tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "block_000.safetensors", "block_001.safetensors", "index.json",
    ]  # fmt: skip
    for block in range(2):
        prefix = f"model.layers.{block}"
        groups = {group.name: (group.features, group.layers) for group in found.groups(block)}
        assert groups == {
            f"{prefix}.self_attn.q_proj": (32, tuple(f"{prefix}.self_attn.{x}_proj" for x in "qkv")),
            f"{prefix}.self_attn.o_proj": (32, (f"{prefix}.self_attn.o_proj",)),
            f"{prefix}.mlp.gate_proj": (32, (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")),
            f"{prefix}.mlp.down_proj": (64, (f"{prefix}.mlp.down_proj",)),
        }
        stored = load_file(tmp_path / "s" / f"block_{block:03d}.safetensors")
        assert set(stored) == {f"{name}.{kind}" for name in groups for kind in ("gram", "energy")}
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert (index["format"], index["mode"], index["tokens"]) == (2, "gram", 96)


def test_diagonal_mode(model: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = cpu(model, tiny_tokens(5), tmp_path / "s", mode="diagonal", batch=2)
    for layer, gram in expected.items():
        assert relative(found.energy(layer), gram.diagonal()) < 1e-5, layer
    with pytest.raises(HwpqError, match="diagonal only"):
        found.gram("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("mode", ["gram", "diagonal"])
def test_energies_are_read_without_the_matrices(model: Path, tmp_path: Path, mode: str) -> None:
    found = cpu(model, tiny_tokens(3), tmp_path / "s", mode=mode)
    grams = {name: found.gram(name) for name in found.layers} if mode == "gram" else {}
    for file in (tmp_path / "s").glob("*.safetensors"):
        stored = load_file(file)
        if mode == "gram":
            for name in [name for name in stored if name.endswith(".gram")]:
                energy = stored[name.replace(".gram", ".energy")]
                assert energy.tolist() == [float(stored[name][j, j]) for j in range(len(energy))]
        save_file({name: tensor for name, tensor in stored.items() if name.endswith(".energy")}, file)
    for name in found.layers:
        energy = found.energy(name)
        assert energy.dtype == torch.float32
        assert mode == "diagonal" or torch.equal(energy, grams[name].diagonal())


def test_bfloat16_forward_is_near(model: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    """8 bits of mantissa through two blocks: a per cent or so of the largest entry, not more."""
    found = cpu(model, tiny_tokens(5), tmp_path / "s", dtype="bfloat16")
    errors = [relative(found.gram(layer), gram) for layer, gram in expected.items()]
    assert 1e-5 < max(errors) < 0.05
    assert found.index["dtype"] == "bfloat16"


def test_sliding_and_full_attention_blocks_get_their_own_masks(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64,
        query_pre_attn_scalar=8, initializer_range=0.5,
    )  # fmt: skip
    path = tiny_checkpoint(tmp_path / "m", config)
    found = cpu(path, tiny_tokens(3), tmp_path / "s", batch=2)
    for layer, gram in brute_force(path, tiny_tokens(3)).items():
        assert relative(found.gram(layer), gram) < 1e-4, layer


@pytest.mark.parametrize("family", ["opt", "neox"])
def test_other_architectures(tmp_path: Path, family: str) -> None:
    from transformers import GPTNeoXConfig, OPTConfig

    small: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind: Any = {"opt": OPTConfig, "neox": GPTNeoXConfig}[family]
    own = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "neox": {"intermediate_size": 48}}[family]
    path = tiny_checkpoint(tmp_path / "m", kind(max_position_embeddings=64, **own, **small))
    found = cpu(path, tiny_tokens(3), tmp_path / "s", batch=2)
    layers = brute_force(path, tiny_tokens(3))
    assert set(found.layers) >= {layer for layer in layers if "embed_out" not in layer}
    for layer in found.layers:
        assert relative(found.gram(layer), layers[layer]) < 1e-5, layer


def test_non_finite_activations_name_the_layer_and_leave_nothing(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][0] = float("inf")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for mode in ("gram", "diagonal"):
        with pytest.raises(HwpqError, match=r"model\.layers\.1\.mlp\.gate_proj.*NaN or infinite"):
            cpu(path, tiny_tokens(), tmp_path / "s", mode=mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_bad_arguments(model: Path, tmp_path: Path) -> None:
    for tokens, message in ((tiny_tokens() + 1000, "vocabulary has 260"), (tiny_tokens()[0], "of shape")):
        with pytest.raises(HwpqError, match=message):
            cpu(model, tokens, tmp_path / "s")
    for option, message in (
        ({"mode": "full"}, "mode full"),
        ({"dtype": "int3"}, "int3"),
        ({"batch": 0}, "batch"),
    ):
        with pytest.raises(HwpqError, match=message):
            cpu(model, tiny_tokens(), tmp_path / "s", **option)
    with pytest.raises(HwpqError, match="no such checkpoint"):
        cpu(tmp_path / "none", tiny_tokens(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_damaged_statistics(model: Path, tmp_path: Path) -> None:
    found = cpu(model, tiny_tokens(1), tmp_path / "s")
    with pytest.raises(HwpqError, match="no statistics of layer lm_head"):
        found.gram("lm_head")
    block = tmp_path / "s" / "block_001.safetensors"
    block.write_bytes(block.read_bytes()[:-4])
    with pytest.raises(HwpqError, match=r"block_001.*corrupt"):
        found.gram("model.layers.1.mlp.down_proj")
    save_file({"model.layers.1.mlp.down_proj.gram": torch.ones(3, 3)}, block)
    with pytest.raises(HwpqError, match="shape"):
        found.gram("model.layers.1.mlp.down_proj")
    block.unlink()
    with pytest.raises(HwpqError, match="no such file"):
        Statistics(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text('{"format": 1, "mode": "gram"}')
    with pytest.raises(HwpqError, match=r"format 1 where this version reads 2.*Run the calibrate pipeline again\."):
        Statistics(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text('{"format": 2, "mode": "whole"}')
    with pytest.raises(HwpqError, match=r"not an index of statistics \(mode whole\)"):
        Statistics(tmp_path / "s")


def test_one_sum_a_group_and_progress_a_block(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[int, ...]] = []
    real = Gram.add

    def add(self: Gram, x: torch.Tensor) -> None:
        added.append(tuple(x.shape))
        real(self, x)

    monkeypatch.setattr(Gram, "add", add)
    seen: list[tuple[int, int]] = []
    path = collect_statistics(
        model, tiny_tokens(3), target=tmp_path / "s", device="cpu", dtype="float32", batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(added) == 2 * 2 * 4  # blocks, batches, groups
    assert seen == [(1, 2), (2, 2)]
    assert path == tmp_path / "s"
    assert (Statistics(path).tokens, Statistics(path).dtype) == (72, "float32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu(model: Path, expected: dict[str, np.ndarray], tmp_path: Path, dtype: str) -> None:
    collect_statistics(model, tiny_tokens(5), target=tmp_path / "s", device="cuda", dtype=dtype)
    found = Statistics(tmp_path / "s")
    for layer, gram in expected.items():
        assert relative(found.gram(layer), gram) < (1e-5 if dtype == "float32" else 0.05)


def test_untied_head_and_biases(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", tiny_config(tie_word_embeddings=False, attention_bias=True))
    found = cpu(path, tiny_tokens(2), tmp_path / "s")
    for layer, gram in brute_force(path, tiny_tokens(2)).items():
        assert relative(found.gram(layer), gram) < 1e-5, layer
