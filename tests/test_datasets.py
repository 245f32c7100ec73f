"""Datasets: all or nothing, and round trips."""

from __future__ import annotations

import multiprocessing
import os
import signal

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from kedro.io import DatasetError

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.datasets import (
    AtomicDataset,
    CacheDataset,
    DirectoryDataset,
    PictureDataset,
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
    assert listing(tmp_path / "deep") == [name, f"{name}.crc32"]


def test_atomic_dataset_keeps_the_old_file_when_a_save_fails(tmp_path):
    dataset = AtomicDataset(filepath=str(tmp_path / "m.json"), dataset="json.JSONDataset")
    dataset.save({"a": 1})
    with pytest.raises(DatasetError):
        dataset.save({"a": {1, 2}})  # a set is no JSON: fails half-way
    assert dataset.load() == {"a": 1}
    assert listing(tmp_path) == ["m.json", "m.json.crc32"]


def test_directory_is_swapped_whole(tmp_path):
    scratch = ScratchDataset(filepath=str(tmp_path / "scratch"))
    dataset = DirectoryDataset(filepath=str(tmp_path / "out" / "model"))
    for content in ("one", "two"):
        built = scratch.load() / "model"
        built.mkdir()
        (built / content).write_text(content)
        dataset.save(built)
        assert listing(dataset.load()) == ["checksums.json", content]
    assert listing(tmp_path / "out") == ["model"]


def picture(path):
    path.parent.mkdir(exist_ok=True)
    plt.imsave(path, [[0.0, 1.0], [0.5, 0.2]])
    return path


def test_picture_is_moved(tmp_path):
    built = picture(tmp_path / "built.png")
    whole = built.read_bytes()
    dataset = PictureDataset(filepath=str(tmp_path / "out" / "plot.png"))
    dataset.save(built)
    assert dataset.load().read_bytes() == whole
    assert not built.exists()


def test_scratch_is_fresh_every_time(tmp_path):
    dataset = ScratchDataset(filepath=str(tmp_path))
    assert dataset.load() != dataset.load()


@pytest.mark.parametrize("dataset", [ScratchDataset, CacheDataset])
def test_working_space_is_no_output(tmp_path, dataset):
    with pytest.raises(DatasetError):
        dataset(filepath=str(tmp_path)).save(1)


@pytest.mark.parametrize("dataset", [PictureDataset, DirectoryDataset])
def test_what_is_missing_is_named_with_the_remedy(tmp_path, dataset):
    with pytest.raises(DatasetError, match="nothing") as caught:
        dataset(filepath=str(tmp_path / "nothing")).load()
    assert isinstance(caught.value.__cause__, HwpqError)
    assert "kedro run" in str(caught.value)


# --- damage ------------------------------------------------------------------------------------------


def damages(whole: bytes):
    """The bytes with one bit flipped, at each place in turn; then cut, and with more at the end."""
    for place in range(len(whole)):
        yield whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
    yield from (whole[: len(whole) // 2], b"", whole + b" ")


def refused(dataset) -> str:
    with pytest.raises(DatasetError) as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, HwpqError)
    return str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("name", "definition", "value"),
    [
        ("seconds.json", {"type": "json.JSONDataset"}, {"select": 1.25}),
        ("prompts.json", {"type": "json.JSONDataset"}, [{"prompt": "a", "text": "b"}]),
        ("layers.csv", {"type": "pandas.CSVDataset", "save_args": {"index": False}}, TABLE),
        ("table.parquet", {"type": "pandas.ParquetDataset"}, TABLE),
    ],
)
def test_every_damage_to_a_file_is_named_with_the_remedy(tmp_path, name, definition, value):
    dataset = AtomicDataset(filepath=str(tmp_path / name), dataset=definition)
    dataset.save(value)
    whole = (tmp_path / name).read_bytes()
    for damaged in damages(whole):
        (tmp_path / name).write_bytes(damaged)
        assert refused(dataset) == (
            f"{tmp_path / name}: its bytes are not those that were written. Run the pipeline that makes it again."
        )
    (tmp_path / name).write_bytes(whole)
    dataset.load()
    (tmp_path / f"{name}.crc32").write_text("00000000\n")
    assert name in refused(dataset)
    (tmp_path / f"{name}.crc32").unlink()  # as in data of earlier versions
    dataset.load()


def test_every_damage_to_a_picture_is_named(tmp_path):
    dataset = PictureDataset(filepath=str(tmp_path / "plot.png"))
    whole = picture(tmp_path / "plot.png").read_bytes()
    dataset.load()
    for damaged in damages(whole):
        (tmp_path / "plot.png").write_bytes(damaged)
        assert refused(dataset).startswith(f"{tmp_path / 'plot.png'}: its bytes are not those")


def test_every_damage_to_a_directory_is_named(tmp_path):
    built = tmp_path / "built"
    (built / "inner").mkdir(parents=True)
    (built / "inner" / "config.json").write_text('{"layers": 8}')
    (built / "w.safetensors").write_bytes(b"has its own")
    digest = sha256_directory(built)
    dataset = DirectoryDataset(filepath=str(tmp_path / "model"))
    dataset.save(built)
    assert sha256_directory(dataset.load()) == digest
    for name in ("inner/config.json", "checksums.json"):
        file = tmp_path / "model" / name
        whole = file.read_bytes()
        for damaged in damages(whole):
            file.write_bytes(damaged)
            if name == "checksums.json" and damaged == whole + b" ":
                continue  # the same list
            assert str(tmp_path / "model") in refused(dataset)
        file.write_bytes(whole)
    (tmp_path / "model" / "w.safetensors").rename(tmp_path / "w")
    assert refused(dataset).startswith(f"{tmp_path / 'model' / 'w.safetensors'}: no such file")
    (tmp_path / "w").rename(tmp_path / "model" / "w.safetensors")
    (tmp_path / "model" / "inner" / "config.json").unlink()
    assert refused(dataset).startswith(
        f"{tmp_path / 'model' / 'inner' / 'config.json'}: no such file. Run the pipeline"
    )


# --- left-overs --------------------------------------------------------------------------------------


def die_while(work, *arguments):
    """Kill a process in the middle of `work`, which calls `os.replace` for the n-th time."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def killed_at(number: int, save, *arguments):
    """Run `save`, and end this process instead of renaming for the `number`-th time."""
    rename, left = os.replace, [number]

    def replace(*paths):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = replace  # type: ignore[assignment]
    save(*arguments)


@pytest.mark.parametrize("rename", [1, 2])
def test_a_file_of_a_killed_process_is_the_old_or_the_new_one_and_nothing_stays(tmp_path, rename):
    dataset = AtomicDataset(filepath=str(tmp_path / "m.json"), dataset="json.JSONDataset")
    dataset.save({"a": 1})
    die_while(killed_at, rename, dataset.save, {"a": 2})
    assert dataset.load() == {"a": rename}
    assert len(listing(tmp_path)) > 1
    dataset.save({"a": 3})
    assert listing(tmp_path) == ["m.json", "m.json.crc32"]
    assert dataset.load() == {"a": 3}


@pytest.mark.parametrize("rename", [1, 2])
def test_a_directory_of_a_killed_process_is_the_old_one_and_nothing_stays(tmp_path, rename):
    dataset = DirectoryDataset(filepath=str(tmp_path / "out" / "model"))
    for number in (1, 2, 3):
        built = tmp_path / f"built-{number}"
        built.mkdir()
        (built / str(number)).touch()
    dataset.save(tmp_path / "built-1")
    die_while(killed_at, rename, dataset.save, tmp_path / "built-2")
    assert listing(dataset.load()) == ["1", "checksums.json"]
    die_while(killed_at, rename, dataset.save, tmp_path / "built-2")
    dataset.save(tmp_path / "built-3")
    assert listing(tmp_path / "out") == ["model"]
    assert listing(dataset.load()) == ["3", "checksums.json"]
