"""What a packed checkpoint says of itself in `config.json`: read back, and refused where it says something else."""

from __future__ import annotations

import json

import pytest

from hwpq_pipeline.checkpoints.packed_form import PackedForm
from hwpq_pipeline.errors import HwpqError

FORM = PackedForm(
    layers=("a.q_proj", "a.k_proj"), kept_dtype="int8", scale_dtype="bfloat16", grid="int8", tables=("embed",),
    table_dtype="int8", tensors=9,
)  # fmt: skip


@pytest.mark.parametrize("form", [FORM, PackedForm(layers=("x",), kept_dtype="bfloat16", tensors=2),
                                  PackedForm(("x",), "uint8", "bfloat16", 64, "int4", tensors=3)])  # fmt: skip
def test_what_is_written_is_read(form: PackedForm) -> None:
    section = json.loads(json.dumps(form.section()))
    assert section["quant_method"] == "hwpq"
    assert PackedForm.of(section, where="here") == form
    assert form.four_bits == (form.kept_dtype == "uint8")


#: By entry: values that may not stand there in `FORM`.
WRONG: dict[str, list[object]] = {
    "layers": [None, [], "a", ["a", 3], [""], ["a", "a"], ["a..b"], {"a": 1}],
    "tables": [None, "embed", [None], ["embed", "embed"], ["a.q_proj"]],
    "kept_dtype": [None, "nn", "float64", "int16", "bfloat16", "uint8", 8, ["int8"]],
    "scale_dtype": [None, 16, "nn", "int8", "float64", ["float32"]],
    "group_size": ["64", 0, -32, True, 64, 7, 32.0],
    "grid": [["int8"], "int5", "nvfp4", "", 8],
    "table_dtype": [None, "nn", "uint8", "float32", 8, ["int8"]],
    "tensors": [None, 0, -1, True, 9.0, "9"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_describes_no_packed_layers_is_refused(name: str, value: object) -> None:
    section = json.loads(json.dumps({**FORM.section(), name: value}))
    with pytest.raises(
        HwpqError, match=rf"^here: config.json: quantization_config\.{name} does not describe"
    ) as caught:
        PackedForm.of(section, where="here: config.json")
    assert "Export the variant again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 1}, "packed format 1, and this is the code for 2"),
        ({"version": 2.0}, r"packed format 2\.0, and this"),
        ({"version": None}, "packed format None"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq', not 'hwpq'"),
        ({"quant_method": None}, "quantization_config.quant_method is None"),
        ({"grid": None}, "quantization_config.kept_dtype does not"),
        ({"grid": None, "kept_dtype": "float32"}, "quantization_config.scale_dtype does not"),
        ({"grid": "int4", "kept_dtype": "uint8", "group_size": 48}, "quantization_config.group_size does not"),
        ({"tables": []}, "quantization_config.table_dtype does not"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(changes: dict[str, object], said: str) -> None:
    section = json.loads(json.dumps({**FORM.section(), **changes}))
    with pytest.raises(HwpqError, match=said):
        PackedForm.of(section, where="here: config.json")


@pytest.mark.parametrize("name", FORM.section())
def test_an_entry_that_is_missing_is_named(name: str) -> None:
    section = {key: value for key, value in FORM.section().items() if key != name}
    with pytest.raises(HwpqError, match=f"quantization_config has no {name}|{name} is None|packed format None"):
        PackedForm.of(section, where="here: config.json")
