"""What a packed checkpoint says of itself in `config.json`: read back, and refused where it says something else."""

from __future__ import annotations

import json

import pytest

from hwpq_pipeline.checkpoints.packed import PackedForm
from hwpq_pipeline.errors import HwpqError

FORM = PackedForm(
    layers=("a.q_proj", "a.k_proj"), kept_dtype="int8", scale_dtype="bfloat16", grid="int8", tables=("embed",),
    table_dtype="int8",
)  # fmt: skip


@pytest.mark.parametrize("form", [FORM, PackedForm(layers=("x",), kept_dtype="bfloat16"),
                                  PackedForm(("x",), "uint8", "bfloat16", 64, "int4")])  # fmt: skip
def test_what_is_written_is_read(form: PackedForm) -> None:
    section = json.loads(json.dumps(form.section()))
    assert section["quant_method"] == "hwpq"
    assert PackedForm.of(section, where="here") == form
    assert form.four_bits == (form.kept_dtype == "uint8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 1}, "packed format 1, and this is the code for 2"),
        ({"version": None}, "packed format None"),
        ({"layers": None}, "quantization_config.layers does not"),
        ({"layers": ["a", 3]}, "quantization_config.layers does not"),
        ({"tables": "embed"}, "quantization_config.tables does not"),
        ({"kept_dtype": None}, "quantization_config.kept_dtype does not"),
        ({"kept_dtype": "nn"}, "quantization_config.kept_dtype does not"),
        ({"scale_dtype": 16}, "quantization_config.scale_dtype does not"),
        ({"group_size": "64"}, "quantization_config.group_size does not"),
        ({"group_size": 0}, "quantization_config.group_size does not"),
        ({"group_size": True}, "quantization_config.group_size does not"),
        ({"grid": ["int8"]}, "quantization_config.grid does not"),
    ],
)
def test_what_describes_no_packed_layers_is_refused(changes: dict[str, object], said: str) -> None:
    section = json.loads(json.dumps({**FORM.section(), **changes}))
    with pytest.raises(HwpqError, match=said) as caught:
        PackedForm.of(section, where="here: config.json")
    assert "Export the variant again" in str(caught.value)
