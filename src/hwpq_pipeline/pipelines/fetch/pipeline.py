"""source → dense model, corpus, table of documents, and what both are."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from .nodes import fetch_corpus, fetch_model, identify, read_documents


def create_pipeline() -> Pipeline:
    """The model, and the corpus with its table."""
    return Pipeline(
        [
            node(
                fetch_model, ["params:model", "downloads", "scratch"], ["model", "fetch_measured"], name="fetch_model"
            ),
            node(fetch_corpus, ["params:corpus", "downloads", "scratch"], "corpus", name="fetch_corpus"),
            node(read_documents, ["corpus", "model"], "documents", name="read_documents"),
            node(identify, ["model", "corpus"], "sources", name="identify"),
        ]
    )
