"""Rules of pre-tokenizers by name, and names by rule, with the `tokenizers` library as the judge of a rule."""

from __future__ import annotations

import json

import pytest

from hwpq_pipeline.checkpoints.pre_tokenizers import PRE_TOKENIZERS, name_of, rule_of

#: How each rule cuts this text; `Ġ` is a space.
TEXT = "It's 2024 A"
PIECES = {
    "smollm": ["It", "'s", "Ġ", "2", "0", "2", "4", "ĠA"],
    "gpt-2": ["It", "'s", "Ġ2024", "ĠA"],
    "llama-bpe": ["It", "'s", "Ġ", "202", "4", "ĠA"],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_rule_cuts_text_as_its_name_says(name: str) -> None:
    from tokenizers import Tokenizer

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    tokenizer = Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": rule_of(name)}))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)] == PIECES[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_rule_is_found_again(name: str) -> None:
    rule = rule_of(name)
    assert rule is not None
    assert name_of(rule) == name
    text = json.dumps(rule)
    assert name_of(json.loads(text.replace('"trim_offsets": true', '"trim_offsets": false'))) == name
    assert name_of(json.loads(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))) is None


def test_a_rule_without_a_name_has_none() -> None:
    assert rule_of("default") is None
    assert name_of({"type": "Whitespace"}) is None
    assert name_of({}) is None
