"""One meaning of `auto`: what the hardware multiplies."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.decoder.dtypes import dtype_name, resolve_dtype
from hwpq_pipeline.errors import HwpqError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("capabilities", "expected"), [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)])
def test_auto_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", CPU) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_other_words_are_what_they_say(name: str) -> None:
    assert dtype_name(resolve_dtype(name, CPU)) == name


def test_an_unknown_word_is_named_with_its_place() -> None:
    with pytest.raises(HwpqError, match=r"evaluation\.dtype: unknown dtype 'float64'.*auto, float32, bfloat16"):
        resolve_dtype("float64", CPU, where="evaluation.dtype")
