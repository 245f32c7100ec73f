"""Nodes that bring the dense model and the text here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.sources import ModelSource
from hwpq_pipeline.checkpoints.sources import fetch_model as fetch_model_into
from hwpq_pipeline.corpus.chat import as_text
from hwpq_pipeline.corpus.documents import CorpusSource, read_corpus
from hwpq_pipeline.corpus.documents import fetch_corpus as fetch_corpus_into
from hwpq_pipeline.measuring import Measured, Measuring
from hwpq_pipeline.parameters import Corpus, Model
from hwpq_pipeline.progress import progress_bar


def fetch_model(model: Model, downloads: Path, scratch: Path) -> tuple[Path, Measured]:
    """Write the dense model as a Hugging Face checkpoint in `scratch`; the checkpoint, and what that took."""
    measuring = Measuring("fetch")
    source = ModelSource(**model.model_dump(exclude={"dtype"}))
    target = fetch_model_into(source, scratch / "model", downloads, dtype=model.dtype)
    return target, measuring.end(target)


def fetch_corpus(corpus: Corpus, downloads: Path, scratch: Path) -> Path:
    """Write the documents as one Parquet file beside their source in `scratch`."""
    with progress_bar("fetch: documents") as progress:
        return fetch_corpus_into(CorpusSource(**corpus.model_dump()), scratch / "corpus", downloads, progress)


def read_documents(corpus: Path, model: Path) -> pd.DataFrame:
    """The documents as a checked table, chats in the words of the model's template."""
    return as_text(read_corpus(corpus), model)


def identify(model: Path, corpus: Path) -> dict[str, dict[str, Any]]:
    """Say of `model` and `corpus` where they came from, and what is in them: `source` and `sha256` of the directory.

    This is the one place that hashes them; all variants share the answer.
    """
    return {
        name: {"source": read_json(folder / "source.json"), "sha256": sha256_directory(folder)}
        for name, folder in (("model", model), ("corpus", corpus))
    }
