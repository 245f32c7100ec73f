"""The node that writes further formats: what is asked for, with a card each, and nothing that a variant cannot have."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hwpq_pipeline.export.formats import further_formats
from hwpq_pipeline.parameters import Calibration, Export
from hwpq_pipeline.pipelines.export.nodes import export_formats, export_variant
from tests.export.making import HEADS, make_two_of_four
from tests.tiny import tiny_checkpoint, tiny_config

CALIBRATION = Calibration(samples=4, length=64, seed=0)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Model, corpus and a 2:4 compressed model."""
    model, corpus = tiny_checkpoint(tmp_path / "model", tiny_config(**HEADS)), tmp_path / "corpus"
    corpus.mkdir()
    (model / "source.json").write_text(json.dumps({"name": "tiny", "license": "apache-2.0"}))
    (corpus / "source.json").write_text(json.dumps({"name": "words"}))
    make_two_of_four(tmp_path / "compressed", "int8", None)
    (tmp_path / "scratch").mkdir()
    return model, corpus, tmp_path / "compressed"


def test_every_format_is_there_with_its_card(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    wanted = Export(formats=tuple(further_formats()))
    made, measured = export_formats(*sources, "v", "d", CALIBRATION, wanted, tmp_path / "scratch")
    assert set(measured) == {"formats"}
    assert {path.name for path in made.iterdir()} == set(further_formats())
    for folder in made.iterdir():
        card = (folder / "README.md").read_text()
        assert "## How to load" in card
        assert f"export.formats: [{folder.name}]" in card
        assert "dvc repro export@v" in card


def test_a_format_that_the_variant_cannot_have_is_left_out_and_said(
    sources: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = sources[2] / "recipe.json"
    file.write_text(file.read_text().replace('"2of4"', '"dense"'))
    wanted = Export(formats=("semi-structured", "gguf"))
    with caplog.at_level(logging.INFO):
        made, _ = export_formats(*sources, "v", "d", CALIBRATION, wanted, tmp_path / "scratch")
    assert [path.name for path in made.iterdir()] == ["gguf"]
    assert "no semi-structured export of v: semi-structured holds structure 2of4, not dense" in caplog.text


def test_without_formats_there_is_an_empty_directory_and_the_export_is_as_before(
    sources: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    made, nothing = export_formats(*sources, "v", "d", CALIBRATION, Export(), tmp_path / "scratch")
    assert not list(made.iterdir())
    assert nothing == {}
    export, measured = export_variant(*sources, "v", "d", CALIBRATION, tmp_path / "scratch")
    assert "Zeros are stored like other weights" in (export / "README.md").read_text()
    assert set(measured) == {"export"}
    assert measured["export"]["disk_bytes"] == sum(file.stat().st_size for file in export.iterdir())
