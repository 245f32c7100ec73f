"""Datasets: all or nothing, and round trips."""

from __future__ import annotations

import pandas as pd
import pytest
from kedro.io import DatasetError

from hwpq_pipeline.datasets import (
    AtomicDataset,
    CacheDataset,
    DirectoryDataset,
    FileDataset,
    ScratchDataset,
)
from hwpq_pipeline.errors import HwpqError

TABLE = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("wrapped", "name"), [("pandas.ParquetDataset", "t.parquet"), ("pandas.CSVDataset", "t.csv")])
def test_atomic_dataset_round_trip_leaves_nothing_else(tmp_path, wrapped, name):
    definition = {"type": wrapped, **({"save_args": {"index": False}} if "CSV" in wrapped else {})}
    dataset = AtomicDataset(filepath=str(tmp_path / "deep" / name), dataset=definition)
    dataset.save(TABLE)
    pd.testing.assert_frame_equal(dataset.load(), TABLE)
    assert listing(tmp_path / "deep") == [name]


def test_atomic_dataset_keeps_the_old_file_when_a_save_fails(tmp_path):
    dataset = AtomicDataset(filepath=str(tmp_path / "m.json"), dataset="json.JSONDataset")
    dataset.save({"a": 1})
    with pytest.raises(DatasetError):
        dataset.save({"a": {1, 2}})  # a set is no JSON: fails half-way
    assert dataset.load() == {"a": 1}
    assert listing(tmp_path) == ["m.json"]


def test_directory_is_swapped_whole(tmp_path):
    scratch = ScratchDataset(filepath=str(tmp_path / "scratch"))
    dataset = DirectoryDataset(filepath=str(tmp_path / "out" / "model"))
    for content in ("one", "two"):
        built = scratch.load() / "model"
        built.mkdir()
        (built / content).write_text(content)
        dataset.save(built)
        assert listing(dataset.load()) == [content]
    assert listing(tmp_path / "out") == ["model"]


def test_file_is_moved(tmp_path):
    built = tmp_path / "built.png"
    built.write_bytes(b"png")
    dataset = FileDataset(filepath=str(tmp_path / "out" / "plot.png"))
    dataset.save(built)
    assert dataset.load().read_bytes() == b"png"
    assert not built.exists()


def test_scratch_is_fresh_every_time(tmp_path):
    dataset = ScratchDataset(filepath=str(tmp_path))
    assert dataset.load() != dataset.load()


@pytest.mark.parametrize("dataset", [ScratchDataset, CacheDataset])
def test_working_space_is_no_output(tmp_path, dataset):
    with pytest.raises(DatasetError):
        dataset(filepath=str(tmp_path)).save(1)


@pytest.mark.parametrize("dataset", [FileDataset, DirectoryDataset])
def test_what_is_missing_is_named_with_the_remedy(tmp_path, dataset):
    with pytest.raises(DatasetError, match="nothing") as caught:
        dataset(filepath=str(tmp_path / "nothing")).load()
    assert isinstance(caught.value.__cause__, HwpqError)
    assert "kedro run" in str(caught.value)
