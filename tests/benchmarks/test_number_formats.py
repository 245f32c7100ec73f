"""The bench of number formats on a tiny model: the library's rounding is on the formats' grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.judge import linears
from benchmarks.number_formats import FORMATS, by_library
from hwpq_pipeline.compression.codes import round_to
from hwpq_pipeline.compression.grids import GRIDS
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", FORMATS)
def test_the_librarys_codes_are_ours_at_its_scales(tmp_path: Path, name: str) -> None:
    preset, _, size = FORMATS[name]
    model, dense = tiny_model(), tiny_model()
    by_library(model, preset)
    plain = dict(linears(dense))
    for layer_name, layer in linears(model):
        weight, original = layer.weight.detach(), plain[layer_name].weight.detach()
        groups, before = weight.unflatten(1, (-1, size)), original.unflatten(1, (-1, size))
        largest = groups.abs().amax(2)  # 6 or 4 times the scale, since a maximum is among a group's codes
        found = []
        for code in (12.0, 8.0):
            scale = largest / code
            values = round_to(original, scale, GRIDS[name]).float().unflatten(1, (-1, size)) * scale[..., None]
            found.append(((values - groups).abs() < 1e-5 + 1e-3 * before.abs()).all(2))
        assert bool((found[0] | found[1]).all())
