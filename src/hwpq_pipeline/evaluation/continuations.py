"""What a variant writes: prompts continued greedily, so that people can compare the figures (metrics) with text.

Greedy decoding takes the likeliest token each time and draws nothing, so the same export writes the same text. The text
says less than the perplexity does, and it is what people ask for first. All prompts go through the model together. A
step costs about the same for one prompt as for a few, because rounding the activations of every layer costs more than
the products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hwpq_pipeline.checkpoints.tokenizer import load_tokenizer
from hwpq_pipeline.errors import HwpqError

from .loading import open_model


def continue_prompts(
    export_dir: str | Path, prompts: Sequence[str], *, new_tokens: int, dtype: str = "float32"
) -> list[dict[str, str]]:
    """Continue each prompt with a model loaded as a user would.

    Args:
        export_dir: a checkpoint with its tokenizer.
        prompts: plain text. It is continued as it stands, without a chat template.
        new_tokens: the most tokens for each; the model may end its text earlier.
        dtype: `float32`, `bfloat16` or `auto`.

    Returns:
        `prompt` and `continuation`, in the order of the prompts.

    Raises:
        HwpqError: the export does not load, or a prompt has no token.
    """
    if not prompts:
        return []
    tokenizer = load_tokenizer(export_dir)
    given = tokenizer(list(prompts))["input_ids"]
    for prompt, tokens in zip(prompts, given, strict=True):
        if not tokens:
            raise HwpqError(f"{prompt!r} has no token", where="report.prompts", remedy="Give it some text.")
    # Padding is masked, so any token will do; a tokenizer may have none for it.
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    longest = max(map(len, given))  # what is written follows the prompt, hence the padding before it
    ids = torch.tensor([[padding] * (longest - len(tokens)) + list(tokens) for tokens in given])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in given])
    model = open_model(export_dir, dtype, ids)
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=padding,
        )
    texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return [{"prompt": prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)]
