"""A variant with a budget through `kedro run`, beside the door for Python."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from hwpq_pipeline import compress
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.corpus.samples import token_matrix
from tests.conftest import run_in
from tests.small import VARIANTS, configure, kedro, ok

CHOICES = ["int8", "int4-32", "int3-32"]
ENTRY = {
    "description": "Whatever fits.",
    "sequential": True,
    "budget": {"ratio": 0.5, "choices": CHOICES, "embeddings": "int8"},
}


@pytest.mark.slow
def test_a_budget_runs_from_its_entry_to_an_export_that_fits(small: Path, tmp_path: Path) -> None:
    configure(small, "parameters_variants", variants={**VARIANTS, "fitting": ENTRY})
    shown = (
        ok(run_in(small, "hwpq", "plan", warm=True)).stdout + ok(run_in(small, "hwpq", "variants", warm=True)).stdout
    )
    assert "compress of fitting" in shown  # by the plan
    assert shown.count("fitting") > shown.count(" of fitting")  # and by the list of variants
    assert "int8 / int4, groups of 32 / int3, groups of 32" in shown
    done = ok(kedro(small, "--namespaces", "variants.fitting"))
    assert "gap to the best sharing 0" in " ".join((done.stdout + done.stderr).split())
    data = small / "data"
    model, export = data / "01_raw" / "model", data / "07_export" / "fitting"
    choices = json.loads((data / "05_selection" / "fitting" / "choices.json").read_text())
    assert choices.keys() == set(layer_map(model).names)
    assert set(choices.values()) <= set(CHOICES)
    assert Checkpoint(export).size_bytes <= 0.5 * Checkpoint(model).size_bytes
    recipe = json.loads((export / "recipe.json").read_text())["recipe"]
    assert "budget" not in recipe
    told = {name: one["quantization"]["grid"] for one in recipe["overrides"] for name in one["match"]}
    assert told == {name: word.partition("-")[0] for name, word in choices.items()}
    metrics = json.loads((data / "08_reporting" / "fitting" / "metrics.json").read_text())
    assert metrics["compression_ratio"] >= 2
    tokens = token_matrix(pd.read_parquet(data / "02_intermediate" / "calibration.parquet"))
    made = compress(model, ENTRY, out=tmp_path / "fitting", calibration=tokens, device="cpu")
    assert made.recipe.budget is None
    for file in export.glob("*.safetensors"):
        assert file.read_bytes() == (made.path / file.name).read_bytes()
