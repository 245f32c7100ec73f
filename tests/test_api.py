"""The door for Python: the pipelines' own bytes, the example of the documentation, and errors in one line."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import hwpq_pipeline
from hwpq_pipeline import compress, load
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.recipe import Recipe
from tests.conftest import ROOT
from tests.small import VARIANTS
from tests.tiny import tiny_checkpoint, tiny_config, tiny_documents, tiny_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("api") / "model", tiny_config(hidden_size=64))


def write_text(folder: Path) -> Path:
    folder.mkdir(parents=True)
    records = tiny_documents(count=6, words=800)[["title", "text"]].to_dict("records")
    (folder / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dense"])
def test_the_bytes_are_the_pipelines(small_project: Path, tmp_path: Path, name: str) -> None:
    data = small_project / "data"
    tokens = token_matrix(pd.read_parquet(data / "02_intermediate" / "calibration.parquet"))
    made = compress(data / "01_raw" / "model", VARIANTS[name], out=tmp_path / name, calibration=tokens, device="cpu")
    export = data / "07_export" / name
    for file in [path for path in export.iterdir() if path.name not in ("README.md", "recipe.json", "checksums.json")]:
        assert (made.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((made.path / "recipe.json").read_text())["recipe"] == made.recipe.to_json()


def test_the_example_of_the_documentation_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    example = re.search(r"<!-- example -->\n(.*?)\n<!-- end of example -->", page, re.DOTALL)
    assert example
    code = textwrap.dedent(example[1])
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(model)
    write_text(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/python.md", "exec"), {})  # noqa: S102 (the documentation's own ten lines)
    assert "models/mine-small" in capsys.readouterr().out


def test_what_is_loaded_is_what_was_written(model: Path, tmp_path: Path) -> None:
    variant = {"selection": {"structure": "2of4"}, "recovery": {"preset": "fast"}}
    made = compress(model, variant, out=tmp_path / "out", calibration=tiny_tokens(8, 32), device="cpu")
    loaded, written = load(made.path), load_file(made.path / "model.safetensors")
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in written.items())
    layers = [name for name in written if name.removesuffix(".weight") in made.layers]
    assert layers
    for name in layers:
        assert bool(((written[name] != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    assert all(facts["reached_sparsity"] == 0.5 for facts in made.layers.values())


def test_a_recipe_is_taken_as_it_is(model: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_variant({"quantization": {"grid": "int8"}})
    made = compress(model, recipe, out=tmp_path / "out", device="cpu")  # needs no text
    assert made.recipe == recipe
    assert load(made.path)(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ({"quantization": {"grid": "int5"}}, {}, "recipe.quantization.grid: 'int5' is none of"),
        ({"recovery": {}}, {}, "add selection or remove recovery"),
        ({"selection": {"structure": "2of4"}}, {}, "needs text to calibrate on.*calibration="),
        ({"selection": {"structure": "2of4"}}, {"calibration": "no/such"}, "no/such: no such file"),
        ({"selektion": {}}, {}, "Extra inputs"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    model: Path, tmp_path: Path, variant: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HwpqError, match=message) as caught:
        compress(model, variant, out=tmp_path / "out", device="cpu", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    int8: dict[str, Any] = {"quantization": {"grid": "int8"}}
    for taken in (model, tmp_path):
        before = sorted(path.name for path in taken.iterdir())
        with pytest.raises(HwpqError, match="no export of ours"):
            compress(model, int8, out=taken, device="cpu")
        assert sorted(path.name for path in taken.iterdir()) == before
    (tmp_path / "empty").mkdir()
    for out in ("empty", "empty", "new"):  # the second time it holds an export
        assert (compress(model, int8, out=tmp_path / out, device="cpu").path / "model.safetensors").is_file()


def test_the_package_opens_without_torch() -> None:
    """Commands start fast: torch comes with the first use of the door."""
    import subprocess
    import sys

    code = "import sys, hwpq_pipeline, hwpq_pipeline.parameters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        hwpq_pipeline.decompress  # noqa: B018
