"""A whole model: any executor gives the same bytes, results come as they are ready, and errors name what lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.masks import Masks, MaskWriter
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.groups import Group, open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import compress_model, write_model
from hwpq_pipeline.method.select import SelectedGroup, select_model
from tests.beyond_linear import gpt_oss
from tests.tiny import tiny_checkpoint, tiny_model, tiny_tokens

R = TypeVar("R")
TOKENS = tiny_tokens(16, 32)
INT4 = {"grid": "int4", "group_size": 32, "method": "coordinate_descent"}
RECIPES: dict[str, dict[str, Any]] = {
    "2of4": {"selection": {"structure": "2of4"}, "recovery": {"preset": "fast"}, "quantization": INT4},
    "unstructured": {"selection": {"structure": "unstructured", "sparsity": 0.5}, "recovery": {}},
    "int4": {"quantization": INT4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_checkpoint(folder / "model")
    collect_statistics(folder / "model", TOKENS, target=folder / "statistics", dtype="float32")
    return folder


def in_processes(step: Callable[[Group], R], groups: Iterable[Group]) -> Iterator[R]:
    """Another interpreter takes the steps: they and the groups must pickle, and hold all that they need."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield from pool.map(step, groups)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_variant(RECIPES["2of4"])
    written = {}
    ways: dict[str, dict[str, Any]] = {"here": {}, "there": {"executor": in_processes}}
    for name, options in ways.items():
        (tmp_path / name).mkdir()
        write_model(root / "model", root / "statistics", recipe, tmp_path / name, name="v", **options)
        written[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    assert written["here"] == written["there"]


@pytest.mark.parametrize("name", RECIPES)
def test_in_one_go_or_in_two_stages(root: Path, tmp_path: Path, name: str) -> None:
    recipe = Recipe.from_variant(RECIPES[name])
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    facts = write_model(root / "model", root / "statistics", recipe, tmp_path / "one", name="v")
    groups = open_groups(root / "model", root / "statistics")
    writer = MaskWriter(tmp_path / "masks")
    selected = select_model(groups, recipe, sink=writer.add)
    masks = Masks(writer.close())
    tensors: dict[str, torch.Tensor] = {}
    compressed = compress_model(groups, masks, recipe, sink=lambda group: tensors.update(group.tensors))
    assert {layer: {**selected[layer], **compressed[layer]} for layer in selected} == facts
    one: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "one").glob("*.safetensors"):
        one |= read_tensors(file)
    assert one.keys() == tensors.keys()
    assert all(torch.equal(one[key], tensors[key]) for key in one)
    assert set(masks) == (set() if recipe.selection is None else {layer.name for layer in groups.layers})


def test_the_compressed_model_says_how_it_was_made(root: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_variant({**RECIPES["2of4"], "sequential": True})
    (tmp_path / "out").mkdir()
    write_model(root / "model", root / "statistics", recipe, tmp_path / "out", name="mine", tokens=TOKENS)
    made = CompressedModel(tmp_path / "out")
    assert (made.variant, made.grid, made.group_size, made.structure) == ("mine", "int4", 32, "2of4")
    assert Recipe.from_json(made.recipe) == recipe


def test_each_group_is_handed_on_before_the_next_one_is_worked_on(root: Path) -> None:
    groups, events = open_groups(root / "model", root / "statistics"), []

    def executor(step: Callable[[Group], R], groups: Iterable[Group]) -> Iterator[R]:
        for group in groups:
            events.append(("begun", group.name))
            yield step(group)

    recipe = Recipe.from_variant(RECIPES["int4"])
    compress_model(groups, {}, recipe, sink=lambda group: events.append(("sunk", group.name)), executor=executor)
    names = list(groups.members())
    assert events == [event for name in names for event in (("begun", name), ("sunk", name))]


def test_what_is_out_of_reach_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model(gpt_oss()).save_pretrained(tmp_path / "model")
    told = {}
    for name, variant in {"int8": {"quantization": {"grid": "int8"}}, "dense": {}}.items():
        caplog.clear()
        (tmp_path / name).mkdir()
        write_model(tmp_path / "model", None, Recipe.from_variant(variant), tmp_path / name, name=name)
        told[name] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told["dense"] == []
    (line,) = told["int8"]
    assert line.startswith("Left dense: model.layers.*.mlp.router: router of experts, ")


def test_what_lacks_is_named(root: Path) -> None:
    groups = open_groups(root / "model", root / "statistics")
    sparse = Recipe.from_variant(RECIPES["2of4"])
    with pytest.raises(HwpqError, match=r"q_proj.*no mask"):
        compress_model(groups, {}, sparse, sink=lambda group: None)
    with pytest.raises(HwpqError, match="need calibration tokens"):
        compress_model(groups, {}, Recipe.from_variant({**RECIPES["int4"], "sequential": True}), sink=lambda _: None)
    with pytest.raises(HwpqError, match="nothing to select by"):
        select_model(open_groups(root / "model", None), sparse, sink=lambda group: None)


def test_masks_are_read_one_at_a_time_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    bits = {"a": torch.tensor([[5]], dtype=torch.uint8), "b": torch.tensor([[7]], dtype=torch.uint8)}
    writer = MaskWriter(tmp_path / "m")
    for name, mask in bits.items():
        writer.add(SelectedGroup(name, {name: mask}, {}))
    writer.add(SelectedGroup("dense", {}, {}))
    masks = Masks(writer.close())
    assert sorted(masks) == ["a", "b"]
    assert torch.equal(masks["b"], bits["b"])
    with pytest.raises(KeyError):
        masks["c"]
    assert list(Masks(MaskWriter(tmp_path / "none").close())) == []
    (tmp_path / "m" / "a.safetensors").write_bytes(b"no")
    with pytest.raises(HwpqError, match=r"a\.safetensors"):
        masks["a"]
    (tmp_path / "m" / "a.safetensors").unlink()
    with pytest.raises(HwpqError, match=r"a\.safetensors"):
        masks["a"]
    with pytest.raises(HwpqError, match=r"index\.json"):
        Masks(tmp_path / "nowhere")
