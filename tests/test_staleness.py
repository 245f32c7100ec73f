"""What a change makes stale: the method's numbers reach DVC variant by variant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.small import EWMA, VARIANTS, configure, dvc, ok, ran

RECIPE = Path("src") / "hwpq_pipeline" / "method" / "presets.py"
FAST = '"fast": Preset("descent", rounds=2, sweeps=1)'


def stale(project: Path) -> set[str]:
    """Stages that `dvc status` names; `track` is always there."""
    return set(json.loads(ok(dvc(project, "status", "--json")).stdout)) - {"track"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "variants"),
    [
        (FAST, FAST.replace("sweeps=1", "sweeps=2"), {"2of4-fp8"}),
        ("DAMPING, SEQUENTIAL_DAMPING = 0.01, 0.3", "DAMPING, SEQUENTIAL_DAMPING = 0.02, 0.3", {"2of4-fp8", EWMA}),
        ("DAMPING, SEQUENTIAL_DAMPING = 0.01, 0.3", "DAMPING, SEQUENTIAL_DAMPING = 0.01, 0.2", set()),
    ],
    ids=["preset", "default", "unused"],
)
def test_a_changed_number_makes_the_variants_stale_that_use_it(
    small: Path, before: str, after: str, variants: set[str]
) -> None:
    file = small / RECIPE
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    assert stale(small) == {"recipes"}
    assert "recipes" in ran(ok(dvc(small, "repro", "recipes")))
    computed = {f"{stage}@{variant}" for stage in ("select", "compress") for variant in variants}
    assert stale(small) == computed | ({"report"} if variants else set())  # the page shows the recipes


@pytest.mark.slow
def test_a_changed_description_compresses_nothing_again(small: Path) -> None:
    changed = {**VARIANTS, EWMA: {**VARIANTS[EWMA], "description": "Other words."}}
    configure(small, "parameters_variants", variants=changed)
    ok(dvc(small, "repro", "recipes"))
    assert not {stage for stage in stale(small) if stage.startswith(("select", "compress"))}
    assert yaml.safe_load((small / "conf/base/parameters_variants.yml").read_text())["variants"] == changed
