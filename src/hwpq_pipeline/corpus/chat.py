"""Chats as text: a document that is a list of messages becomes what the model's own template makes of it.

The template stands in the model's tokenizer. transformers runs it in a sandbox that reaches nothing outside of the
messages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from hwpq_pipeline.checkpoints.tokenizer import load_tokenizer
from hwpq_pipeline.errors import HwpqError, reading


def as_text(documents: pd.DataFrame, model_dir: str | Path) -> pd.DataFrame:
    """The documents with every chat as text: columns `id`, `title`, `text`.

    Args:
        documents: as `documents.read_corpus` gives them; a column `chat` tells the chats.
        model_dir: the checkpoint whose template counts.

    Raises:
        HwpqError: the model has no chat template, or the template refuses a chat.
    """
    if "chat" not in documents:
        return documents
    tokenizer = load_tokenizer(model_dir)
    if not getattr(tokenizer, "chat_template", None):
        raise HwpqError(
            "the text is chats, and the model has no chat template",
            where=str(model_dir),
            remedy="Use a chat model, or plain text.",
        )
    texts = []
    for row, (text, chat) in enumerate(zip(documents["text"], documents["chat"], strict=True)):
        with reading(f"document {row}", what="the chat template refuses it", remedy="Mend or remove this chat."):
            texts.append(tokenizer.apply_chat_template(json.loads(text), tokenize=False) if chat else text)
    return documents.drop(columns="chat").assign(text=texts)
