"""Token samples: fixed windows of real text, drawn once and stored.

Documents with an even row number calibrate and those with an odd one evaluate, so that no article does both. Each
document is cut into windows of exactly `length` tokens. Windows do not overlap and do not cross into the next document;
the rest of a document is dropped. A seeded generator picks among all windows of the split without replacement.
Perplexity depends on all of this, so the ids are written out and every later step reads them.

Some tokenizers start a text with a special token (Llama's BOS). Then every window begins with it, and it counts in
`length`: such models use the first token as an attention sink and behave differently without it. Other tokenizers
(SmolLM2's) add none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from hwpq_pipeline.checkpoints.tokenizer import check_length, load_tokenizer
from hwpq_pipeline.errors import HwpqError

Split = Literal["calibration", "evaluation"]
_PARITY = {"calibration": 0, "evaluation": 1}


def draw_samples(
    documents: pd.DataFrame,
    tokenizer_dir: str | Path,
    *,
    split: Split,
    samples: int,
    length: int,
    seed: int,
) -> pd.DataFrame:
    """Draw token windows from a split of the documents.

    Args:
        documents: one row for each document, with the column `text`.
        tokenizer_dir: a checkpoint directory with the tokenizer.
        split: `calibration` takes even rows, `evaluation` odd ones.
        samples: number of windows.
        length: tokens in a window, special start tokens included.
        seed: the generator's.

    Returns:
        Columns `sample` (0 … samples − 1), `document` (row number) and `tokens` (a list of `length` ids).

    Raises:
        HwpqError: no usable tokenizer there, a length without room for text or over the model's positions, or fewer
            windows than wanted.
    """
    check_length(tokenizer_dir, length, f"{split}.length")
    tokenizer = load_tokenizer(tokenizer_dir)
    prefix = start_tokens(tokenizer)
    if length <= len(prefix):
        raise HwpqError(f"no room for text in {length} tokens", where="length", remedy="Use longer samples.")
    rows = [row for row in range(len(documents)) if row % 2 == _PARITY[split]]
    texts = [str(documents["text"].iloc[row]) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids_of, body = dict(zip(rows, encoded, strict=True)), length - len(prefix)
    windows = [(row, start) for row, ids in ids_of.items() for start in range(0, len(ids) - body + 1, body)]
    if len(windows) < samples:
        raise HwpqError(
            f"{len(rows)} documents give {len(windows)} windows of {length} tokens, {samples} are wanted",
            where=f"{split} samples",
            remedy="Use fewer or shorter samples, or a larger corpus.",
        )
    generator = np.random.default_rng([seed, _PARITY[split]])
    drawn = [windows[index] for index in generator.choice(len(windows), size=samples, replace=False)]
    return pd.DataFrame(
        {
            "sample": np.arange(samples, dtype=np.int64),
            "document": np.array([row for row, _ in drawn], dtype=np.int64),
            "tokens": [prefix + list(ids_of[row][start : start + body]) for row, start in drawn],
        }
    )


def token_matrix(samples: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The samples' ids, shape (samples, length), int64."""
    return np.stack([np.asarray(tokens, dtype=np.int64) for tokens in samples["tokens"]])


def start_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; many put none."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
