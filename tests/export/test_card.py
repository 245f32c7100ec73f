"""The model card: metadata that hubs accept, the same text for the same variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.card import CardInfo, check_card, render_card
from hwpq_pipeline.export.compressed_tensors import FORMAT, STORAGE
from hwpq_pipeline.export.formats import further_formats

INFO = CardInfo(
    variant="2of4-fp8",
    description="2:4 sparse: recovered, in 8-bit floating point.",
    base_model="acme/small-1",
    license="apache-2.0",
    grid="fp8_e5m2",
    structure="2of4",
    parameters={"selection": {"structure": "2of4", "metric": "hwpq"}, "sweeps": (1, 2)},
    calibration={"text": "Wikipedia", "samples": 32, "length": 512, "seed": 0},
    command="kedro run --namespaces variants.2of4-fp8",
)


def test_metadata_is_read_back_by_the_hubs_library() -> None:
    data = ModelCard(render_card(INFO, STORAGE)).data.to_dict()
    assert data["base_model"] == "acme/small-1"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert set(data["tags"]) == {"hwpq", "compressed-tensors", "fp8", "pruned", "2:4"}


def test_text_says_what_was_done_and_how_to_repeat_it() -> None:
    text = render_card(INFO, STORAGE)
    for part in ("E5M2", "stored as E4M3", "2:4", "apache-2.0", "Wikipedia", "| samples | 32 |",
                 "AutoModelForCausalLM.from_pretrained", INFO.command, INFO.description):  # fmt: skip
        assert part in text, part
    block = text.split("## Parameters\n\n```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {"selection": {"structure": "2of4", "metric": "hwpq"}, "sweeps": [1, 2]}


def test_every_kind_of_variant_has_a_card() -> None:
    for grid in (*GRIDS, None):
        for structure in ("dense", "2of4", "unstructured"):
            check_card(render_card(replace(INFO, grid=grid, structure=structure, calibration={}, command=""), STORAGE))
    assert "base_model_relation" not in render_card(replace(INFO, grid=None, structure="dense"), STORAGE)


LIBRARIES = {"compressed-tensors": "transformers", "gguf": "gguf", "gguf-f16": "gguf", "onnx": "onnx",
             "semi-structured": "hwpq-pipeline"}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_format_has_a_card_that_names_it(name: str) -> None:
    text = render_card(INFO, {FORMAT.name: FORMAT, **further_formats()}[name].storage)
    data = ModelCard(text).data.to_dict()
    assert name.removesuffix("-f16") in data["tags"]
    assert data["library_name"] == LIBRARIES[name]
    assert (name == "semi-structured") != ("Zeros are stored" in text)


def test_no_format_is_without_a_card() -> None:
    assert {FORMAT.name, *further_formats()} == set(LIBRARIES)


def test_the_same_variant_gives_the_same_card() -> None:
    assert render_card(INFO, STORAGE) == render_card(replace(INFO), STORAGE)


def test_a_path_is_no_base_model_for_hubs() -> None:
    data = ModelCard(render_card(replace(INFO, base_model="/models/mine here"), STORAGE)).data.to_dict()
    assert "base_model" not in data


def test_unknown_licence_is_said_to_be_unknown() -> None:
    data = ModelCard(render_card(replace(INFO, license=None), STORAGE)).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "unknown")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# No metadata\n", "no metadata"),
        ("---\nlicense: Apache 2.0\n---\n\n# A\n", "no licence id"),
        ("---\nlicense: other\n---\n\n# A\n", "license_name"),
        ("---\nlicense: mit\nbase_model: a/b/c\n---\n\n# A\n", "no repository id"),
        ("---\nlicense: mit\n---\n\n", "no text"),
    ],
)
def test_bad_cards_are_refused(text: str, what: str) -> None:
    with pytest.raises(HwpqError, match=what):
        check_card(text)


def test_bad_licence_is_refused_when_the_card_is_made() -> None:
    with pytest.raises(HwpqError, match="Apache License"):
        render_card(replace(INFO, license="Apache License"), STORAGE)


def test_what_only_some_layers_have_and_what_was_learnt_is_said() -> None:
    mixed = render_card(replace(INFO, others=("int4",), partly=True), STORAGE)
    for line in ("(2:4)", GRIDS["int4"].words, GRIDS["fp8_e5m2"].words):
        (found,) = [part for part in mixed.splitlines() if part.startswith("- ") and line in part]
        assert found.endswith("(in the layers that *Parameters* names)")
    healed = render_card(replace(INFO, healed_tokens=122_880), STORAGE)
    assert "(besides, the norms of these blocks learnt as well)" in healed
    assert "on at most 122,880 tokens" in healed
    assert "nothing else is changed" in render_card(INFO, STORAGE)
    tables = render_card(replace(INFO, grid=None, structure="dense", embeddings="int8"), STORAGE)
    assert "here unchanged" not in tables
    assert "the embedding and the head" in tables
