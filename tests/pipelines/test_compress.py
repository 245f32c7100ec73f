"""The nodes of `select` and `compress` on a tiny model: every kind of recovery, for both structures."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.parameters import Compute
from hwpq_pipeline.pipelines.compress.nodes import compress_weights, settled_recipe
from hwpq_pipeline.pipelines.select.nodes import select_weights
from hwpq_pipeline.variant import Variant
from tests.tiny import tiny_checkpoint, tiny_tokens

CPU = Compute(device="cpu")
# More of them than a layer has inputs, so that the Gram matrices are of full rank.
TOKENS = tiny_tokens(16, 32)
STRUCTURES = {"2of4": {"structure": "2of4"}, "unstructured": {"structure": "unstructured", "sparsity": 0.5}}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("compress")
    tiny_checkpoint(root / "model")
    collect_statistics(root / "model", TOKENS, target=root / "statistics")
    return root


def run(places, scratch, compute=CPU, **sections):
    variant = Variant.model_validate({"description": "d", **sections})
    model, statistics = places / "model", places / "statistics"
    samples = pd.DataFrame({"tokens": list(TOKENS)})
    choices, masks, selected, _ = select_weights(model, statistics, samples, "v", variant, compute, scratch)
    recipe = settled_recipe(variant, choices)
    built, compressed, measured = compress_weights(model, statistics, samples, masks, "v", recipe, compute, scratch)
    tensors: dict[str, torch.Tensor] = {}
    for file in built.glob("*.safetensors"):
        tensors |= read_tensors(file)
    return built, tensors, selected, compressed, measured


@pytest.mark.parametrize("preset", ["fixed_mask", "fast", "balanced", "admm", "quality"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_recovery_betters_every_layer_and_keeps_the_structure(places, tmp_path, structure, preset):
    built, tensors, selected, table, measured = run(
        places, tmp_path, selection=STRUCTURES[structure], recovery={"preset": preset}
    )
    assert (table["error_recovered"] < table["error_pruned"]).all()
    assert table["error_quantized"].isna().all()
    assert len(tensors) == len(table) == len(selected) == 14
    assert set(measured) == {"compress"}
    written = sum(file.stat().st_size for file in built.iterdir())
    assert measured["compress"]["disk_bytes"] == written > sum(weight.nbytes for weight in tensors.values())
    for name, weight in tensors.items():
        assert name.endswith(".weight")
        if structure == "2of4":
            assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    zeros = sum(int((weight == 0).sum()) for weight in tensors.values())
    assert zeros / sum(weight.numel() for weight in tensors.values()) == pytest.approx(0.5, abs=0.002)
    written = read_json(built / "recipe.json")
    assert written["structure"] == structure
    assert written["recipe"]["recovery"]["preset"] == preset
    assert written["recipe"]["recovery"]["damping"] == (0.3 if preset == "quality" else 0.01)


def test_moving_the_mask_betters_the_model_as_a_whole(places, tmp_path):
    totals = []
    for preset in ("fixed_mask", "balanced"):
        folder = tmp_path / preset
        folder.mkdir()
        *_, table, _ = run(places, folder, selection=STRUCTURES["2of4"], recovery={"preset": preset})
        totals.append(table["error_recovered"].sum())
    assert totals[1] < totals[0]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sequential_keeps_structure_and_zeros(places, tmp_path, structure):
    sections = {"selection": STRUCTURES[structure], "recovery": {"preset": "fast"}, "sequential": True}
    built, tensors, _, table, _ = run(
        places, tmp_path, **sections, quantization={"grid": "int4", "group_size": 32, "method": "coordinate_descent"}
    )
    codes = {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}
    assert len(codes) == len(read_json(built / "recipe.json")["layers"]) == 14
    assert (table["error_recovered"] < table["error_pruned"]).all()
    if structure == "2of4":
        assert all(bool(((code != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()) for code in codes.values())


def test_rounding_keeps_the_zeros(places, tmp_path):
    _, tensors, _, table, _ = run(
        places, tmp_path, selection=STRUCTURES["2of4"], recovery={}, quantization={"grid": "fp8_e4m3"}
    )
    codes = {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}
    assert len(codes) == 14
    for tensor in codes.values():
        assert tensor.dtype == torch.float8_e4m3fn
        assert bool(((tensor.float() != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    assert table["error_quantized"].notna().all()


def test_dense_is_nothing_but_a_recipe(places, tmp_path):
    built, tensors, selected, table, _ = run(places, tmp_path)
    assert [path.name for path in built.iterdir()] == ["recipe.json"]
    assert tensors == {}
    assert (selected["reached_sparsity"] == 0).all()
    assert table["error_pruned"].isna().all()


@pytest.fixture(scope="module")
def silent_places(tmp_path_factory):
    """A model whose second feed-forward network gets nothing but zeros, as an expert that no token is sent to."""
    root = tmp_path_factory.mktemp("silent")
    tiny_checkpoint(root / "model")
    file = root / "model" / "model.safetensors"
    tensors = read_tensors(file)
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    collect_statistics(root / "model", TOKENS, target=root / "statistics")
    return root


SILENT = [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")]


@pytest.mark.parametrize("preset", ["fixed_mask", "fast", "balanced", "admm", "quality"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_layer_that_no_token_reaches_is_kept_by_magnitude_and_told(
    silent_places, tmp_path, caplog, structure, preset
):
    dense = read_tensors(silent_places / "model" / "model.safetensors")
    _, tensors, selected, *_ = run(
        silent_places, tmp_path, selection=STRUCTURES[structure], recovery={"preset": preset}
    )
    for layer in SILENT:
        weight, found = dense[f"{layer}.weight"], tensors[f"{layer}.weight"]
        keep = found != 0
        assert torch.equal(found[keep], weight[keep])
        assert keep.double().mean().item() == pytest.approx(0.5, abs=0.002)
        if structure == "2of4":
            quads = weight.abs().unflatten(1, (-1, 4))
            assert torch.equal(keep.unflatten(1, (-1, 4)), quads >= quads.sort(-1).values[..., 2:3])
        else:  # the moving average's threshold is another one for each weight
            assert weight[keep].abs().mean() > 2 * weight[~keep].abs().mean()
    metrics = dict(zip(selected["layer"], selected["metric"], strict=True))
    assert {layer for layer, metric in metrics.items() if metric == "magnitude"} == set(SILENT)
    (line,) = [record.getMessage() for record in caplog.records if "No calibration token" in record.getMessage()]
    assert all(layer in line for layer in SILENT)


def test_a_silent_layer_is_rounded_as_without_data(silent_places, tmp_path, caplog):
    descent = {"grid": "int4", "group_size": 32, "method": "coordinate_descent"}
    _, tensors, *_ = run(silent_places, tmp_path, quantization=descent)
    for layer in SILENT:
        dense = read_tensors(silent_places / "model" / "model.safetensors")[f"{layer}.weight"]
        scale = tensors[f"{layer}.scale"].repeat_interleave(32, 1)
        codes = tensors[f"{layer}.codes"].float()
        assert torch.equal(codes, (dense / scale).round().clamp(-8, 7))
        assert ((codes * scale - dense).norm() / dense.norm()).item() < 0.12
    assert "No calibration token reached 3 layers" in caplog.text


def test_a_mask_that_keeps_nothing_is_refused(places, tmp_path):
    variant = Variant.model_validate({"description": "d", "selection": STRUCTURES["unstructured"], "recovery": {}})
    samples = pd.DataFrame({"tokens": list(TOKENS)})
    _, masks, *_ = select_weights(places / "model", places / "statistics", samples, "v", variant, CPU, tmp_path)
    file = masks / "model.layers.1.mlp.gate_proj.safetensors"
    tensors = read_tensors(file)
    tensors["model.layers.1.mlp.up_proj.keep"].zero_()
    save_file(tensors, file)
    recipe = settled_recipe(variant, {})
    with pytest.raises(HwpqError, match=r"^model\.layers\.1\.mlp\.up_proj: its mask keeps no weight"):
        compress_weights(places / "model", places / "statistics", samples, masks, "v", recipe, CPU, tmp_path)


def test_a_multiplier_that_drops_all_is_refused(places, tmp_path):
    with pytest.raises(HwpqError, match=r"q_proj: every weight is dropped.*multiplier"):
        run(places, tmp_path, selection={"structure": "unstructured", "multiplier": 10000}, recovery={})


def test_a_group_that_does_not_divide_is_named(places, tmp_path):
    with pytest.raises(HwpqError, match=r"model\.layers\.0\.self_attn\.q_proj.*32"):
        run(places, tmp_path, quantization={"grid": "int4", "group_size": 64})


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_cuda_kernels_give_the_same_variant(places, tmp_path, monkeypatch, structure):
    """The nodes with every CUDA kernel in its place: on a GPU where there is one, else interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'hwpq-pipeline[cuda]'")
    from hwpq_pipeline.kernels.coordinate_descent import cuda as descent
    from hwpq_pipeline.kernels.ewma_select import cuda

    fixed = {"structure": "unstructured", "multiplier": 0.0}  # a search for each row is long when interpreted
    sections = {
        "selection": fixed if structure == "unstructured" else STRUCTURES[structure],
        "recovery": {},
        "quantization": {"grid": "int4", "group_size": 32, "method": "coordinate_descent", "sweeps": 1},
    }
    for name in ("cpu", "cuda"):
        (tmp_path / name).mkdir()
    _, expected, wanted, on_cpu, _ = run(places, tmp_path / "cpu", **sections)
    asked: list[str] = []

    def wanted_here(tensor: torch.Tensor, where: str) -> bool:
        asked.append(where)
        return True

    if not torch.cuda.is_available():
        # Few programs of many rows: the interpreter takes as long for one row as for all.
        monkeypatch.setattr(cuda, "default_tile", lambda rows: cuda.Tile(64, 32, 4, 2))
        monkeypatch.setattr(descent, "ROWS", 128)
        for kernel in ("ewma_select", "two_of_four", "group_scale", "coordinate_descent"):
            module = f"hwpq_pipeline.kernels.{kernel}.wants_cuda"
            monkeypatch.setattr(module, wanted_here)
    compute = Compute(device="cuda" if torch.cuda.is_available() else "cpu")
    _, found, selected, table, _ = run(places, tmp_path / "cuda", compute, **sections)
    assert torch.cuda.is_available() or len(set(asked)) == 3  # the selection's, and both of the rounding
    assert found.keys() == expected.keys()
    assert selected["reached_sparsity"].tolist() == pytest.approx(wanted["reached_sparsity"].tolist(), abs=0.002)
    for column in ("error_pruned", "error_recovered", "error_quantized"):
        assert table[column].tolist() == pytest.approx(on_cpu[column].tolist(), rel=0.05)
    same = [(found[name] == expected[name]).double().mean().item() for name in found if name.endswith(".codes")]
    assert min(same) > 0.95
