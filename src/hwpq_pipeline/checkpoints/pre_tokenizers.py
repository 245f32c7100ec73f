"""Pre-tokenizers (how text is cut before merging) by the names that GGUF gives them.

llama.cpp has the rules built in and a GGUF file only names one. Hugging Face's `tokenizer.json` writes the rule out.
Reading a GGUF file needs the rule of a name, writing one needs the name of a rule.
"""

from __future__ import annotations

from typing import Any

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


#: The steps of each rule, in the `tokenizers` library's form.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "gpt-2": [_byte_level(use_regex=True)],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False),
    ],
}


def rule_of(name: str) -> dict[str, Any] | None:
    """A name's rule as `tokenizer.json` writes it; None for a name that is not known."""
    steps = PRE_TOKENIZERS.get(name)
    if steps is None:
        return None
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def name_of(rule: dict[str, Any]) -> str | None:
    """The name of a rule from `tokenizer.json`; None for a rule that has none. Offsets may be trimmed or not."""
    steps = rule.get("pretokenizers", []) if rule.get("type") == "Sequence" else [rule]
    for name, known in PRE_TOKENIZERS.items():
        if [_cutting(step) for step in steps] == [_cutting(step) for step in known]:
            return name
    return None


def _cutting(step: dict[str, Any]) -> dict[str, Any]:
    """The options of a step that decide how text is cut."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
