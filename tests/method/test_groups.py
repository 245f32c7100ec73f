"""Groups: the right layers and rows, steps in order, errors by the formula."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.matrices import Matrix
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.layer_columns import IDENTITY, Column, names
from hwpq_pipeline.method import groups
from hwpq_pipeline.method.groups import Groups
from hwpq_pipeline.pipelines.tables import layer_table
from tests.tiny import tiny_checkpoint, tiny_tokens


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("groups")
    model = tiny_checkpoint(root / "model")
    collect_statistics(model, tiny_tokens(), target=root / "gram")
    collect_statistics(model, tiny_tokens(), target=root / "diagonal", mode="diagonal")
    return root


def make(places, statistics="gram", *, checkpoint=Checkpoint, device=None) -> Groups:
    model = places / "model"
    return Groups(checkpoint(model), layer_map(model), Statistics(places / statistics), device)


def test_every_layer_once_with_its_own_rows(places):
    seen = {}
    for group in make(places):
        for layer, rows in group.rows:
            assert layer.name not in seen
            seen[layer.name] = group.original[rows]
    weights = load_file(places / "model" / "model.safetensors")
    assert list(seen) == layer_map(places / "model").names
    assert all(torch.equal(seen[name], weights[f"{name}.weight"]) for name in seen)


def test_layers_of_one_input_are_one_group(places):
    names = [tuple(layer.name.rpartition(".")[2] for layer in group.layers) for group in make(places)]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2


def test_the_next_group_is_read_meanwhile_and_one_at_most(places):
    read: list[str] = []

    class Watched(Checkpoint):
        def weight(self, matrix: Matrix) -> torch.Tensor:
            read.append(matrix.tensor.removesuffix(".weight"))
            return super().weight(matrix)

    groups = make(places, checkpoint=Watched)
    members = [[layer.name for layer in layers] for layers in groups.members().values()]
    for done, group in enumerate(groups):
        wanted = [layer for names in members[: done + 2] for layer in names]
        deadline = time.monotonic() + 10
        while len(read) < len(wanted) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert [layer.name for layer in group.layers] == members[done]
        assert read == wanted


def test_a_group_that_cannot_be_read_stops_the_walk_at_its_turn(places):
    class Damaged(Checkpoint):
        def weight(self, matrix: Matrix) -> torch.Tensor:
            if matrix.tensor.endswith("0.mlp.up_proj.weight"):  # of the third group
                raise HwpqError("no such tensor", where=matrix.tensor, remedy="fetch again")
            return super().weight(matrix)

    groups = make(places, checkpoint=Damaged)
    seen: list[str] = []
    with pytest.raises(HwpqError, match="no such tensor"):
        seen.extend(group.name for group in groups)
    assert len(seen) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_groups_are_worked_on_where_they_are_wanted(places):
    first = next(iter(make(places, device=torch.device("cuda"))))
    assert first.original.is_cuda
    assert first.gram.is_cuda


def test_errors_by_the_formula(places):
    """‖(W−W₀)X‖²/‖W₀X‖² in float64, row by row, column pair by column pair."""
    for group in make(places):
        group = group.with_weight(group.weight.round(decimals=1)).with_measured_error("error_pruned")
        gram = group.gram.double().numpy()
        for layer, rows in group.rows:
            dense = group.original[rows].double().numpy()
            change = group.weight[rows].double().numpy() - dense
            wanted = np.einsum("ij,jk,ik->", change, gram, change) / np.einsum("ij,jk,ik->", dense, gram, dense)
            assert group.facts[layer.name]["error_pruned"] == pytest.approx(wanted, rel=1e-4)


def test_energy_is_computed_once_and_gives_the_same(places):
    first = next(iter(make(places))).with_measured_error("a").with_measured_error("b")
    assert first.energy is not None
    moved = first.with_weight(first.weight * 0.5)
    known, fresh = moved.with_measured_error("c"), replace(moved, energy=None).with_measured_error("c")
    for layer in first.layers:
        assert known.facts[layer.name]["c"] == pytest.approx(fresh.facts[layer.name]["c"], rel=1e-5)
        assert known.facts[layer.name]["c"] == pytest.approx(0.25, rel=1e-4)


def test_diagonal_statistics_know_no_errors(places):
    first = next(iter(make(places, "diagonal"))).with_measured_error("a")
    assert first.facts == {}
    with pytest.raises(HwpqError, match="no Gram matrix"):
        first.gram  # noqa: B018


def test_without_statistics_every_layer_is_a_group_of_its_own(places):
    model = places / "model"
    groups = list(Groups(Checkpoint(model), layer_map(model), None))
    assert [group.name for group in groups] == layer_map(model).names
    assert groups[0].with_measured_error("a").facts == {}


def test_a_damaged_weight_stops_the_walk(places, tmp_path):
    tiny_checkpoint(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    groups = Groups(Checkpoint(tmp_path / "model"), layer_map(tmp_path / "model"), Statistics(places / "gram"))
    with pytest.raises(HwpqError, match=r"model\.layers\.1\.mlp\.down_proj"):
        list(groups)


def test_table_has_a_row_a_layer_and_gaps_for_what_is_not_known(places):
    layers = layer_map(places / "model")
    table = layer_table(layers, {layers.names[1]: {"x": 2.0}}, (Column("x"),))
    assert list(table.columns) == [*names(IDENTITY), "x"]
    assert table["layer"].tolist() == layers.names
    assert table["x"].count() == 1
    assert list(table.loc[1, ["kind", "rows", "columns"]]) == ["k_proj", 16, 32]


def damaged(places, tmp_path, change, group="model.layers.1.mlp.gate_proj"):
    """Statistics whose sums of one group are changed by ``change(gram, energy)``."""
    target = tmp_path / "statistics"
    shutil.copytree(places / "gram", target)
    file = target / "block_001.safetensors"
    tensors = load_file(file)
    gram, energy = (tensors[f"{group}.{suffix}"] for suffix in ("gram", "energy"))
    change(gram, energy)
    save_file(tensors, file)
    return Groups(Checkpoint(places / "model"), layer_map(places / "model"), Statistics(target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gram, energy: gram[1, 2].fill_(float("nan")), "NaN or not symmetric"),
        (lambda gram, energy: gram[1, 2].add_(1e-3), "NaN or not symmetric"),
        (lambda gram, energy: gram[3, 3].fill_(-1.0), "NaN, infinite or negative"),
        (lambda gram, energy: energy[3].fill_(float("inf")), "NaN, infinite or negative"),
    ],
)
def test_damaged_sums_are_named_by_their_group(places, tmp_path, change, message):
    groups = damaged(places, tmp_path, change)
    with pytest.raises(HwpqError, match=rf"^model\.layers\.1\.mlp\.gate_proj: .*{message}.*calibrate"):
        [(group.sums.energy(), group.gram) for group in groups]


def test_layers_that_no_token_reached_are_found(places, tmp_path):
    groups = damaged(places, tmp_path, lambda gram, energy: (gram.zero_(), energy.zero_()))
    assert groups.silent() == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert make(places).silent() == []


def test_sums_that_are_all_zero_are_refused(places, tmp_path):
    target = tmp_path / "statistics"
    shutil.copytree(places / "gram", target)
    for file in target.glob("*.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    groups = Groups(Checkpoint(places / "model"), layer_map(places / "model"), Statistics(target))
    with pytest.raises(HwpqError, match="all sums of all layers are zero"):
        groups.silent()


def test_large_layers_of_a_group_are_worked_on_one_by_one(places, monkeypatch):
    together = make(places)
    whole = {group.name: group for group in together}
    monkeypatch.setattr(groups, "LARGE", 1)
    apart = list(make(places))
    assert len(apart) == len(together.layers) > len(whole)
    for group in apart:
        (layer,) = group.layers
        stack = whole[together.input_of(layer.name)]
        (rows,) = (rows for other, rows in stack.rows if other.name == layer.name)
        assert torch.equal(group.weight, stack.weight[rows])
        assert torch.equal(group.gram, stack.gram)
