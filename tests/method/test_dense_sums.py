"""Matrices that are not kept: the same bytes as where they are, one block's sums at a time, in any order."""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.calibration.walk import DenseWalk
from hwpq_pipeline.checkpoints.parts import Parts
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.dense_sums import DenseSums
from hwpq_pipeline.method.executor import apart
from hwpq_pipeline.method.groups import open_groups
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.method.select import gather_masks, select_model
from hwpq_pipeline.variant import Variant
from tests.beyond_linear import mixtral
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

R = TypeVar("R")
TOKENS = tiny_tokens(6, 32)
CPU = torch.device("cpu")
INT4 = {"grid": "int4", "group_size": 32, "method": "coordinate_descent"}
TWO_OF_FOUR = {"selection": {"structure": "2of4"}, "recovery": {"preset": "fast"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "2of4": {**TWO_OF_FOUR, "quantization": INT4},
    "unstructured": {"selection": {"structure": "unstructured", "sparsity": 0.5}, "recovery": {}},
    "some layers": {"quantization": INT4, "ignore": ["re:.*layers.[0356].*"]},
    "nearest": {"quantization": {"grid": "fp8_e4m3"}},
    "in sequence": {**TWO_OF_FOUR, "quantization": INT4, "sequential": True},
    "budget": {
        "budget": {"choices": ["int8", "int4-32", "2of4-int4-32"], "bits_per_weight": 5},
        "recovery": {"preset": "fast"},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keep")
    tiny_checkpoint(folder / "model", tiny_config(num_hidden_layers=7))
    for keep in ("sums", "nothing"):
        collect(folder / "model", folder / keep, keep)
    return folder


def collect(model: Path, target: Path, keep: str, **options: Any) -> None:
    collect_statistics(model, TOKENS, target=target, keep=keep, **{"dtype": "float32", "batch": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made(model: Path, statistics: Path, entry: dict[str, Any], target: Path, **options: Any) -> tuple[Any, ...]:
    """All bytes of masks and compressed model, and the facts."""
    recipe = Recipe.from_variant(Variant.model_validate({"description": "d", **entry}).model_dump())
    target.mkdir()
    facts = write_model(model, statistics, recipe, target, name="v", tokens=TOKENS, **options)
    masks, parts = (target.with_name(f"{target.name}-{name}") for name in ("masks", "parts"))
    masks.mkdir()
    if recipe.budget is None:
        groups = open_groups(model, statistics)
        select_model(groups, recipe, parts=Parts(parts))
        gather_masks(groups, recipe, Parts(parts), masks)
    return contents(masks), contents(target), facts


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bytes_as_where_they_are_kept(root: Path, tmp_path: Path, name: str) -> None:
    kept, not_kept = (
        made(root / "model", root / keep, VARIANTS[name], tmp_path / keep) for keep in ("sums", "nothing")
    )
    assert kept == not_kept
    assert len(kept[1]) > 1


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"every_expert": True}, {"every_expert": False}])
def test_the_walk_is_that_of_calibrate(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its dtype, its batches and what its experts see are in the index."""
    tiny_model(mixtral()).save_pretrained(tmp_path / "model")
    for keep in ("sums", "nothing"):
        collect(tmp_path / "model", tmp_path / keep, keep, **options)
    stored = Statistics(tmp_path / "sums")
    again = DenseSums(tmp_path / "model", Statistics(tmp_path / "nothing"), CPU)
    for layer in stored.layers:
        assert torch.equal(again.gram(layer), stored.gram(layer)), layer


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each block that was filled."""
    seen: list[int] = []
    real = BlockwiseModel.filled

    def filled(self: BlockwiseModel, number: int) -> Any:
        seen.append(number)
        return real(self, number)

    monkeypatch.setattr(BlockwiseModel, "filled", filled)
    return seen


def sums_again(root: Path) -> DenseSums:
    return DenseSums(root / "model", Statistics(root / "nothing"), CPU)


def test_in_module_order_each_block_runs_once(root: Path, runs: list[int]) -> None:
    for group in open_groups(root / "model", root / "nothing"):
        assert group.gram.shape == (group.weight.shape[1],) * 2
    assert runs == [0, *range(7)]  # the first is also asked what all of them get beside hidden states


@pytest.mark.parametrize("order", [range(6, -1, -1), (3, 3, 1, 6, 0, 2, 5), (2, 6, 5)])
def test_in_any_order(root: Path, runs: list[int], order: Iterable[int]) -> None:
    stored, again = Statistics(root / "sums"), sums_again(root)
    for block in order:
        for group in stored.groups(block):
            assert torch.equal(again.gram(group.name), stored.gram(group.name)), group.name
    assert len(runs) <= 1 + 3.5 * 7


def test_one_block_of_sums_at_a_time(root: Path) -> None:
    again = sums_again(root)
    first, second = (again.statistics.groups(block)[0].name for block in (0, 1))
    gone = weakref.ref(again.gram(first))
    assert gone() is again.gram(first)
    again.gram(second)
    assert gone() is None


def test_the_thread_that_reads_ahead_does_not_walk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    real = DenseWalk.sums

    def sums(self: DenseWalk, *arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return real(self, *arguments)

    monkeypatch.setattr(DenseWalk, "sums", sums)
    assert all(group.known_gram is not None for group in open_groups(root / "model", root / "nothing"))
    assert threads == {threading.current_thread()}


def test_two_threads_ask_at_once(root: Path) -> None:
    stored, again = Statistics(root / "sums"), sums_again(root)
    found: dict[str, torch.Tensor] = {}

    def ask(names: list[str]) -> None:
        for name in names:
            found[name] = again.gram(name)

    names = [group.name for group in stored.groups()]
    workers = [threading.Thread(target=ask, args=(names[start::2],)) for start in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == len(names)
    assert all(torch.equal(found[name], stored.gram(name)) for name in names)


def test_groups_of_a_run_share_the_walk_in_another_process(root: Path, tmp_path: Path, runs: list[int]) -> None:
    """What is sent holds paths; here it goes through pickle and comes back."""

    def elsewhere(function: Callable[[str], R], names: Iterable[str]) -> Iterator[R]:
        for name in names:
            sent = pickle.dumps(function)
            assert len(sent) < 20_000
            yield pickle.loads(sent)(name)  # noqa: S301 (our own)

    entry = VARIANTS["2of4"]
    there = made(root / "model", root / "nothing", entry, tmp_path / "there", executor=apart(elsewhere))
    assert runs == [0, *range(7)]
    assert there == made(root / "model", root / "sums", entry, tmp_path / "here")
    (one, other) = (pickle.loads(pickle.dumps(open_groups(root / "model", None))) for _ in range(2))  # noqa: S301
    assert one.checkpoint is not other.checkpoint  # of two runs: what is in a place may have changed


def test_a_walk_that_failed_begins_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, again = Statistics(root / "sums"), sums_again(root)
    again.gram(stored.groups(1)[0].name)
    real = DenseWalk.sums

    def half(self: DenseWalk, number: int, hidden: Any, kind: Any) -> Any:
        real(self, number, hidden, kind)
        raise MemoryError

    monkeypatch.setattr(DenseWalk, "sums", half)
    name = stored.groups(2)[0].name
    with pytest.raises(MemoryError):
        again.gram(name)
    monkeypatch.setattr(DenseWalk, "sums", real)
    assert torch.equal(again.gram(name), stored.gram(name))


def test_in_sequence_nothing_is_summed_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwpq_pipeline.method.dense_sums.DenseWalk", None)
    assert made(root / "model", root / "nothing", VARIANTS["in sequence"], tmp_path / "out")[1]


def test_another_model_in_its_place_is_told(root: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=7), seed=1)
    (group, *_) = open_groups(other, root / "nothing")
    with pytest.raises(
        HwpqError, match=r"q_proj: the dense model gives other sums than it did in calibrate.*calibrate"
    ):
        group.known_gram  # noqa: B018
