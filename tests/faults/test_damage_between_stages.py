"""Every file between the stages, damaged in every way: the next stage says so in one line, and changes nothing.

By the commands that users type, on a tiny model. Each case damages one file of a project that is whole, runs a stage
that reads it, and puts the file back. `make test` has a handful, `make test-faults` all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hwpq_pipeline.checkpoints.file_checksums import list_directory
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import write_weights
from tests.faults.stages import refusal, run_stage, tree
from tests.small import EWMA, copy_small_project

pytestmark = pytest.mark.slow


def flipped(whole: bytes) -> bytes:
    """One bit, in the last value."""
    place = max(len(whole) - 3, 0)
    return whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]


def flipped_early(whole: bytes) -> bytes:
    """One bit in what says how to read the rest: a header, a name."""
    place = min(40, len(whole) // 2)
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def cut(whole: bytes) -> bytes:
    """The first half, as after a copy that was broken off."""
    return whole[: len(whole) // 2]


WAYS: dict[str, Callable[[bytes], bytes] | None] = {
    "flipped": flipped, "flipped early": flipped_early, "cut": cut, "missing": None,
}  # fmt: skip
GROUP = "model.layers.1.mlp.down_proj.safetensors"
#: Files below `data/`, and a stage that reads each.
FILES = {
    "01_raw/model/model.safetensors": "calibrate",
    "01_raw/model/config.json": "calibrate",
    "01_raw/model/tokenizer.json": "reference",
    "01_raw/model/source.json": "export",
    "01_raw/corpus/corpus.parquet": "export",
    "01_raw/corpus/source.json": "export",
    "01_raw/sources.json": "track",
    "01_raw/fetch_measured.json": "evaluate",
    "02_intermediate/documents.parquet": "calibrate",
    "02_intermediate/calibration.parquet": "compress",
    "02_intermediate/evaluation.parquet": "evaluate",
    "03_primary/statistics/block_001.safetensors": "compress",  # `select` reads the diagonals alone
    "03_primary/statistics/index.json": "select",
    "03_primary/calibrate_measured.json": "evaluate",
    "03_primary/reference/reference.safetensors": "evaluate",
    "03_primary/reference/reference.json": "evaluate",
    "03_primary/reference_measured.json": "evaluate",
    f"04_recipes/{EWMA}.json": "report",
    f"05_selection/{EWMA}/choices.json": "compress",
    f"05_selection/{EWMA}/masks/{GROUP}": "compress",
    f"05_selection/{EWMA}/masks/index.json": "compress",
    f"05_selection/{EWMA}/layers.parquet": "evaluate",
    f"05_selection/{EWMA}/measured.json": "evaluate",
    f"06_models/{EWMA}/model/{GROUP}": "export",
    f"06_models/{EWMA}/model/recipe.json": "export",
    f"06_models/{EWMA}/layers.parquet": "evaluate",
    f"06_models/{EWMA}/measured.json": "evaluate",
    f"07_export/{EWMA}/model.safetensors": "evaluate",
    f"07_export/{EWMA}/config.json": "evaluate",
    f"07_export/{EWMA}/tokenizer.json": "prompts",
    f"07_export/{EWMA}/README.md": "publish",
    f"07_export/{EWMA}/recipe.json": "track",
    f"07_export/{EWMA}.measured.json": "evaluate",
    f"07_export/{EWMA}.formats.measured.json": "evaluate",
    f"08_reporting/{EWMA}/metrics.json": "gate",
    f"08_reporting/{EWMA}/layers.csv": "report",
    f"08_prompts/{EWMA}.json": "report",
    "09_comparison/comparison.csv": "track",
    f"09_comparison/charts/{EWMA}/error_by_layer.png": "track",
}
HANDFUL = (
    ("03_primary/statistics/block_001.safetensors", "flipped"),
    (f"05_selection/{EWMA}/masks/{GROUP}", "cut"),
    (f"06_models/{EWMA}/model/{GROUP}", "flipped"),
    (f"06_models/{EWMA}/measured.json", "flipped early"),
)


@pytest.fixture(scope="module")
def whole(small_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that each test leaves as it was."""
    return copy_small_project(small_project, tmp_path_factory.mktemp("damage") / "project")


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its dense model in shards."""
    project = copy_small_project(whole, tmp_path_factory.mktemp("sharded") / "project")
    model = project / "data" / "01_raw" / "model"
    single = Checkpoint(model)
    tensors = [(name, single.tensor(name)) for name in single.names]
    (model / "model.safetensors").unlink()
    write_weights(model, tensors, shard_bytes=50_000)
    list_directory(model)
    return project


def refused(project: Path, name: str, way: str, stage: str) -> str:
    """What the stage says of the damaged file; it has written nothing."""
    data = project / "data"
    file, damage = data / name, WAYS[way]
    before = file.read_bytes()
    try:
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage(before))
        damaged = tree(data)
        line = refusal(run_stage(project, stage))
        assert tree(data) == damaged
    finally:
        file.write_bytes(before)
    return line


def says_what_to_do(line: str, name: str) -> bool:
    """It names the file, or its directory, and a remedy."""
    place = f"data/{name}"
    folder = place.rpartition("/")[0]
    return (place in line or f"{folder}: " in line) and any(word in line for word in ("again", "Run the pipeline"))


@pytest.mark.parametrize(("name", "way"), HANDFUL)
def test_the_next_stage_notices(whole: Path, name: str, way: str) -> None:
    line = refused(whole, name, way, FILES[name])
    assert says_what_to_do(line, name), line


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_the_next_stage_notices_all(whole: Path, name: str, way: str) -> None:
    line = refused(whole, name, way, FILES[name])
    assert says_what_to_do(line, name), line


@pytest.mark.faults
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("stage", "way"),
    [
        *((stage, way) for stage in ("calibrate", "reference") for way in WAYS),  # read every tensor of the blocks
        *((stage, way) for stage in ("select", "compress", "export") for way in ("cut", "missing")),  # some of them
    ],
)
def test_every_stage_notices_a_shard(sharded: Path, number: int, way: str, stage: str) -> None:
    """Of the first shards: the last may hold a norm alone. A bit is noticed by who reads the tensor that it is in."""
    name = sorted((sharded / "data" / "01_raw" / "model").glob("model-*.safetensors"))[number].name
    line = refused(sharded, f"01_raw/model/{name}", way, stage)
    assert says_what_to_do(line, f"01_raw/model/{name}"), line


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
def test_an_index_of_shards_is_noticed(sharded: Path, way: str) -> None:
    line = refused(sharded, "01_raw/model/model.safetensors.index.json", way, "calibrate")
    assert says_what_to_do(line, "01_raw/model/model.safetensors.index.json"), line


@pytest.mark.faults
def test_a_project_that_was_put_together_again_runs(whole: Path) -> None:
    """Each test above has put its file back: what follows shows that nothing else was wrong."""
    before = tree(whole / "data" / "06_models" / EWMA / "model")
    shutil.rmtree(whole / "data" / "06_models" / EWMA)
    done = run_stage(whole, "compress")
    assert done.returncode == 0, done.stderr
    assert tree(whole / "data" / "06_models" / EWMA / "model") == before
