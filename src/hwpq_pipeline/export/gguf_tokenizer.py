"""The tokenizer of a checkpoint as GGUF's key-value pairs: vocabulary, merges, special tokens, chat template.

llama.cpp has the pre-tokenizers (how text is cut before merging) built in, by name. The name is found from the rule
that `tokenizer.json` writes out (`checkpoints.pre_tokenizers`). A rule without a name is refused: under any of the
names, text would be tokenized differently than in training. Byte-level BPE is served, which the Llama-3, GPT-2 and
SmolLM families use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.pre_tokenizers import PRE_TOKENIZERS, name_of
from hwpq_pipeline.errors import HwpqError

from .llama import USE_ANOTHER


def add_tokenizer(writer: Any, model_dir: Path, vocabulary: int) -> None:
    """Add a checkpoint's tokenizer to a GGUF writer.

    Args:
        writer: a `gguf.GGUFWriter` that has not written yet.
        model_dir: the checkpoint.
        vocabulary: rows of the embedding; ids beyond the tokenizer's own become unused tokens.

    Raises:
        HwpqError: the tokenizer is not byte-level BPE, or cuts text by a rule that llama.cpp does not know.
    """
    from transformers import AutoTokenizer

    content = read_json(model_dir / "tokenizer.json")
    where = f"{model_dir}/tokenizer.json"
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback"):
        raise HwpqError(
            f"a tokenizer of type {content['model'].get('type')} that is not byte-level BPE",
            where=where,
            remedy=USE_ANOTHER,
        )
    tokens, kinds = _tokens(content, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content.get("pre_tokenizer") or {}, where))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    for name in ("bos", "eos", "pad", "unk"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(int(token))
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[UNUSED{index}]" for index in range(vocabulary)]
    kinds = [int(TokenType.UNUSED)] * vocabulary
    for token, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = token, int(TokenType.NORMAL)
    for added in content.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return tokens, kinds


def _pre_tokenizer(rule: dict[str, Any], where: str) -> str:
    name = name_of(rule)
    if name is None:
        raise HwpqError(
            f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}",
            where=where,
            remedy=f"Add llama.cpp's name for it to checkpoints/pre_tokenizers.py. {USE_ANOTHER}",
        )
    return name
