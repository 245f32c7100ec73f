"""The nodes and the order of `fetch`'s digests, `report` and `track`: what is logged, what is shown, and when."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.parameters import Calibration, Evaluation
from hwpq_pipeline.pipelines import report, track
from hwpq_pipeline.pipelines.fetch.nodes import identify
from hwpq_pipeline.pipelines.report.nodes import compare, draw, page
from hwpq_pipeline.pipelines.track.nodes import record
from hwpq_pipeline.tracking.records import Record, flat
from hwpq_pipeline.variant import Variant
from tests.reported import METRICS, layer_figures

ENTRY = {
    "description": "2:4 sparse.",
    "selection": {"structure": "2of4", "metric": "hwpq_weighted"},
    "recovery": {"preset": "fast"},
    "quantization": {"grid": "fp8_e4m3"},
}
CALIBRATION, EVALUATION = Calibration(samples=4, length=64, seed=0), Evaluation(samples=2, length=64, seed=1)
SOURCES = {name: {"source": {"name": f"the {name}"}, "sha256": name[0] * 64} for name in ("model", "corpus")}


def recipe(**changes: float) -> dict[str, Any]:
    made = Recipe.from_variant(ENTRY).to_json()
    return {**made, "recovery": {**made["recovery"], **changes}}


def samples(first: int) -> pd.DataFrame:
    return pd.DataFrame({"sample": [0], "document": [0], "tokens": [[first, 2, 3]]})


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    return folder


def recorded(export: Path, made_by: dict[str, Any]) -> Record:
    (export / "recipe.json").write_text(json.dumps({"variant": "v", "recipe": made_by}))
    plots = (export / "error_by_layer.png", export / "sparsity_by_layer.png")
    return record(
        "v", SOURCES, samples(1), samples(7), export, METRICS, layer_figures(), *plots,
        Variant.model_validate(ENTRY), CALIBRATION, EVALUATION,
    )  # fmt: skip


def test_a_run_holds_every_number_of_the_recipe(export: Path) -> None:
    parameters = flat(recorded(export, recipe()).parameters)
    assert parameters["recovery.preset"] == "fast"
    for number in ("recovery.damping", "recovery.rounds", "recovery.sweeps"):
        assert isinstance(parameters[number], int | float)
    assert parameters["quantization.grid"] == "fp8_e4m3"
    assert parameters["calibration.samples"] == 4


@pytest.mark.parametrize("number", ["damping", "rounds", "sweeps"])
def test_one_preset_with_another_number_is_another_run(export: Path, number: str) -> None:
    one, other = recorded(export, recipe()), recorded(export, recipe(**{number: 17}))
    assert flat(one.parameters)["recovery.preset"] == flat(other.parameters)["recovery.preset"]
    assert one.parameters != other.parameters
    assert one.key != other.key


def test_a_run_holds_the_digests_that_were_made_once(export: Path) -> None:
    found = recorded(export, recipe())
    assert (found.digests["model"], found.digests["corpus"]) == ("m" * 64, "c" * 64)
    assert set(found.digests) == {"model", "corpus", "calibration", "evaluation", "export"}
    assert found.digests["calibration"] != found.digests["evaluation"]
    assert [data.name for data in found.datasets] == [
        "the model", "the corpus: calibration", "the corpus: evaluation",
    ]  # fmt: skip


def test_sources_are_told_with_the_digest_of_all_files(tmp_path: Path) -> None:
    for name in ("model", "corpus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "source.json").write_text(json.dumps({"name": name, "kind": "local"}))
    (tmp_path / "model" / "weights").write_bytes(b"abc")
    found = identify(tmp_path / "model", tmp_path / "corpus")
    assert found["corpus"]["source"] == {"name": "corpus", "kind": "local"}
    lines = "".join(
        f"{hashlib.sha256((tmp_path / 'model' / file).read_bytes()).hexdigest()}  {file}\n"
        for file in ("source.json", "weights")
    )
    assert found["model"]["sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_the_page_shows_the_entry_and_the_recipe(tmp_path: Path) -> None:
    comparison, plot = compare(tmp_path, **{"metrics:v": METRICS})
    text = page(
        comparison, {"v": ENTRY}, CALIBRATION, EVALUATION, [],
        **{"metrics:v": METRICS, "recipe:v": recipe(), "layers:v": layer_figures(), "continuations:v": []},
    )  # fmt: skip
    entry, written_out = text.split("The entry, as written")[1].split("The recipe: every number written out")
    assert "preset: fast" in entry
    assert "damping" not in entry
    for number in ("preset: fast", "damping: 0.01", "rounds: 2", "sweeps: 1"):
        assert number in written_out
    assert "null" not in written_out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_charts_are_drawn_a_variant_at_a_time(tmp_path: Path) -> None:
    alone = report.create_pipeline(["a", "b"]).only_nodes_with_namespaces(["variants.a"])
    assert [node.name for node in alone.nodes] == ["variants.a.draw"]
    assert alone.inputs() == {"variants.a.layers", "scratch"}
    for file in draw(layer_figures(), tmp_path):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_all_that_people_look_at_is_on_disk_before_a_server_can_fail() -> None:
    order = [node.name for node in (report.create_pipeline(["a", "b"]) + track.create_pipeline(["a", "b"])).nodes]
    first = min(order.index(f"variants.{name}.log") for name in "ab")
    for name in ("variants.compare", "variants.write_report", "variants.a.draw", "variants.b.draw"):
        assert order.index(name) < first
    assert not report.create_pipeline(["a"]).inputs() & track.create_pipeline(["a"]).outputs()
