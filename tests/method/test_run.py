"""A whole model: any executor gives the same bytes, results come as they are ready, and errors name what lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.masks import Masks, packed_masks, write_index
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.checkpoints.writer import write_tensors
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.executor import serial
from hwpq_pipeline.method.group import Group
from hwpq_pipeline.method.groups import Groups, open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import compress_model, gather_model, write_model
from hwpq_pipeline.method.select import gather_masks, select_model
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


def one_group(step: Callable[[Group], R], groups: Groups, name: str) -> R:
    (result,) = serial(step, groups.only_those([name]))
    return result


def in_processes(step: Callable[[Group], R], groups: Groups) -> Iterator[R]:
    """Another interpreter takes the steps: they and the groups must pickle, and hold all that they need."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(one_group, step, groups), groups.members())


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
    (tmp_path / "masks").mkdir()
    parts = [Parts(tmp_path / "selection"), Parts(tmp_path / "compression")]
    select_model(groups, recipe, parts=parts[0])
    selected = gather_masks(groups, recipe, parts[0], tmp_path / "masks")
    masks = Masks(tmp_path / "masks")
    compress_model(groups, masks, recipe, parts=parts[1])
    compressed = gather_model(groups, recipe, parts[1], tmp_path / "two", name="v")
    assert {layer: {**selected[layer], **compressed[layer]} for layer in selected} == facts
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(masks) == (set() if recipe.selection is None else {layer.name for layer in groups.layers})


def test_the_compressed_model_says_how_it_was_made(root: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_variant({**RECIPES["2of4"], "sequential": True})
    (tmp_path / "out").mkdir()
    write_model(root / "model", root / "statistics", recipe, tmp_path / "out", name="mine", tokens=TOKENS)
    made = CompressedModel(tmp_path / "out")
    assert (made.variant, made.grid, made.group_size, made.structure) == ("mine", "int4", 32, "2of4")
    assert Recipe.from_json(made.recipe) == recipe


def test_each_group_is_written_before_the_next_one_is_worked_on(root: Path, tmp_path: Path) -> None:
    groups, parts, whole = open_groups(root / "model", root / "statistics"), Parts(tmp_path / "parts"), []

    def executor(step: Callable[[Group], R], groups: Groups) -> Iterator[R]:
        for group in groups:
            whole.append([name for name in groups.members() if parts.is_whole(name)])
            yield step(group)

    compress_model(groups, {}, Recipe.from_variant(RECIPES["int4"]), parts=parts, executor=executor)
    names = list(groups.members())
    assert whole == [names[:number] for number in range(len(names))]


class Killed(BaseException):
    """In the place of a signal that no process survives."""


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, sequential: bool
) -> None:
    recipe = Recipe.from_variant({**RECIPES["int4"], "sequential": sequential})
    groups, parts = open_groups(root / "model", root / "statistics"), Parts(tmp_path / "parts")
    monkeypatch.setattr("hwpq_pipeline.decoder.milestones.EVERY", 0.0)
    kept, real = [], Parts.keep

    def keep(self: Parts, name: str, *others: Any) -> None:
        kept.append(name)
        if len(kept) == after + 1:
            raise Killed
        real(self, name, *others)

    monkeypatch.setattr(Parts, "keep", keep)
    with pytest.raises(Killed):
        compress_model(groups, {}, recipe, parts=parts, tokens=TOKENS)
    done = kept[:-1]
    kept.clear()
    kept.append("so that nothing is killed any more" if after == 0 else "")
    kept.extend([""] * after)
    compress_model(groups, {}, recipe, parts=parts, tokens=TOKENS)
    again = [name for name in kept if name in done]
    blocks = {name: layers[0].block for name, layers in groups.members().items()}
    assert {blocks[name] for name in again} <= ({blocks[done[-1]]} if sequential and done else set())
    for folder in ("disturbed", "whole"):
        (tmp_path / folder).mkdir()
    gather_model(groups, recipe, parts, tmp_path / "disturbed", name="v")
    write_model(root / "model", root / "statistics", recipe, tmp_path / "whole", name="v", tokens=TOKENS)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("disturbed", "whole"))
    assert one == two


def test_a_part_that_was_damaged_is_made_again(root: Path, tmp_path: Path) -> None:
    groups, parts = open_groups(root / "model", root / "statistics"), Parts(tmp_path / "parts")
    recipe = Recipe.from_variant(RECIPES["int4"])
    compress_model(groups, {}, recipe, parts=parts)
    first, second, *_ = (tmp_path / "parts" / f"{name}.safetensors" for name in groups.members())
    whole = [file.read_bytes() for file in (first, second)]
    first.write_bytes(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
    second.write_bytes(whole[1][:-8])
    compress_model(groups, {}, recipe, parts=parts)
    assert [file.read_bytes() for file in (first, second)] == whole


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


def test_what_lacks_is_named(root: Path, tmp_path: Path) -> None:
    groups = open_groups(root / "model", root / "statistics")
    sparse = Recipe.from_variant(RECIPES["2of4"])
    with pytest.raises(HwpqError, match=r"q_proj.*no mask"):
        compress_model(groups, {}, sparse, parts=Parts(tmp_path))
    with pytest.raises(HwpqError, match="need calibration tokens"):
        compress_model(groups, {}, Recipe.from_variant({**RECIPES["int4"], "sequential": True}), parts=Parts(tmp_path))
    with pytest.raises(HwpqError, match="nothing to select by"):
        select_model(open_groups(root / "model", None), sparse, parts=Parts(tmp_path))


def test_masks_are_read_one_at_a_time_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    bits = {"a": torch.tensor([[5]], dtype=torch.uint8), "b": torch.tensor([[7]], dtype=torch.uint8)}
    for folder in ("m", "none"):
        (tmp_path / folder).mkdir()
    for name, mask in bits.items():
        write_tensors(tmp_path / "m" / f"{name}.safetensors", packed_masks({name: mask}))
    masks = Masks(write_index(tmp_path / "m", {"a": "a", "b": "b"}))
    assert sorted(masks) == ["a", "b"]
    assert torch.equal(masks["b"], bits["b"])
    with pytest.raises(KeyError):
        masks["c"]
    assert list(Masks(write_index(tmp_path / "none", {}))) == []
    (tmp_path / "m" / "a.safetensors").write_bytes(b"no")
    with pytest.raises(HwpqError, match=r"a\.safetensors"):
        masks["a"]
    (tmp_path / "m" / "a.safetensors").unlink()
    with pytest.raises(HwpqError, match=r"a\.safetensors"):
        masks["a"]
    with pytest.raises(HwpqError, match=r"index\.json"):
        Masks(tmp_path / "nowhere")
