"""Every export format against every grid and structure: it writes the variant, or it refuses it by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export import compressed_tensors
from hwpq_pipeline.export.formats import STRUCTURES, further_formats
from tests.export.making import HEADS, make_compressed, make_two_of_four
from tests.tiny import tiny_checkpoint, tiny_config

FORMATS = {compressed_tensors.FORMAT.name: compressed_tensors.FORMAT, **further_formats()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads that every format takes."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(**HEADS))


def compressed_model(target: Path, structure: str, grid: str | None) -> CompressedModel:
    group_size = GRIDS[grid].group_sizes[0] if grid and GRIDS[grid].group_sizes else None
    if structure == "2of4":
        make_two_of_four(target, grid, group_size)
    else:
        make_compressed(target, grid, group_size=group_size, structure=structure)
    return CompressedModel(target)


@pytest.mark.parametrize("grid", [*GRIDS, None])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_variant_is_written_or_refused_by_name(
    model: Path, tmp_path: Path, name: str, structure: str, grid: str | None
) -> None:
    one, target = FORMATS[name], tmp_path / "export"
    source = compressed_model(tmp_path / "compressed", structure, grid)
    said = one.refusal(source.structure, source.grid)
    if said is None:
        assert one.write(model, source.path, target) == target
        assert any(file.stat().st_size for file in target.iterdir())
        return
    assert name in said
    assert structure in said or str(grid) in said
    with pytest.raises(HwpqError, match=f"{name} ") as caught:
        one.write(model, source.path, target)
    assert caught.value.what == said
    assert not target.exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_grid_that_a_format_lacks_is_refused_by_name(name: str) -> None:
    lacking = replace(FORMATS[name], grids=("int8",))
    assert lacking.refusal("2of4", "int8") is None
    assert lacking.refusal("2of4", None) is None
    assert lacking.refusal("2of4", "int4") == f"{name} has no place for grid int4; it holds int8"


def test_names_are_the_words_that_parameters_take() -> None:
    from hwpq_pipeline.parameters import Export

    assert Export(formats=tuple(further_formats())).formats == tuple(further_formats())
    assert all(name == one.name for name, one in FORMATS.items())


def test_activations_are_rounded_as_the_grid_says() -> None:
    """The grid's word for activations is on every card; the scheme is what engines run."""
    for grid in compressed_tensors.FORMAT.grids:
        group_size = next(iter(GRIDS[grid].group_sizes), None)
        config = compressed_tensors.quantization_config({(grid, group_size): ["Linear"]}, [])
        scheme = config["config_groups"]["group_0"]
        rounded = scheme["input_activations"]
        assert scheme["weights"]["num_bits"] == GRIDS[grid].bits
        assert (rounded is not None) == (GRIDS[grid].activations is not None)
        if rounded is not None:
            assert GRIDS[grid].activations == ("FP8" if rounded["type"] == "float" else "INT8")
