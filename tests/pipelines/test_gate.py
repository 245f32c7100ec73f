"""The pipeline `gate` on files as they lie on disk, damaged ones too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.pipelines import gate
from hwpq_pipeline.pipelines.gate.limits import QualityGates
from tests.reported import METRICS

WHOLE = json.dumps(METRICS)


def run_gate(folder: Path, text: str, limits: dict[str, float]) -> None:
    """The check of variants `a` (its metrics as given) and `b` (whole)."""
    for name, content in {"a": text, "b": WHOLE}.items():
        (folder / f"{name}.json").write_text(content)
    catalog = DataCatalog(
        {
            "params:quality_gates": MemoryDataset(QualityGates(variants={"a": limits})),
            **{f"variants.{name}.metrics": JSONDataset(filepath=str(folder / f"{name}.json")) for name in "ab"},
        }
    )
    SequentialRunner().run(gate.create_pipeline(["a", "b"]), catalog)


def test_whole_figures_pass(tmp_path: Path) -> None:
    run_gate(tmp_path, WHOLE, {"minimum_coverage": 0.99})


@pytest.mark.parametrize("limits", [{"minimum_coverage": 0.99}, {}])
@pytest.mark.parametrize("text", ["{}", "null", "[]", WHOLE.replace('"coverage": 1.0', '"coverage": null')])
def test_a_gate_without_its_figure_fails_in_one_line(tmp_path: Path, text: str, limits: dict[str, float]) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        run_gate(tmp_path, text, limits)
    (error,) = caught.value.exceptions
    assert isinstance(error, HwpqError)
    assert str(error).startswith("metrics of a: no ")
    assert "\n" not in str(error)


def test_a_figure_that_is_nan_keeps_no_limit(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        run_gate(tmp_path, WHOLE.replace('"coverage": 1.0', '"coverage": NaN'), {"minimum_coverage": 0.99})
    (error,) = caught.value.exceptions
    assert "coverage is nan, below minimum_coverage 0.99" in str(error)
