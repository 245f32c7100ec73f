"""Documents from a user's files: plain text, JSON, JSON lines and Parquet, packed with gzip or not.

`.txt` and `.md` are one document each. `.json` holds an array, `.jsonl` (`.ndjson`) a line for each, `.parquet` a row
for each. A record is an object whose text stands in a named column (a JSON string alone will do), with a `title` beside
it if there is one. A text is a string, or a chat: a list of messages, which the model's template turns into text later
(`chat`). Records without a text (null, NaN, empty) are dropped and counted. Anything else in the column is an error
that names the row: no number and no list is ever taken for its Python form.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from hwpq_pipeline.errors import HwpqError, reading

PLAIN, RECORDS = (".txt", ".md"), (".json", ".jsonl", ".ndjson", ".parquet")
_REMEDY = "Mend the row, or remove it."


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        title: of it.
        text: of it; of a chat, its messages as JSON.
        chat: whether it is a chat.
    """

    title: str
    text: str
    chat: bool = False


def kind_of(file: Path) -> str | None:
    """The suffix that says how a file is read, in lower case and without `.gz`; None for one that is not read."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    return kind if kind in (*PLAIN, *RECORDS) and not (packed and kind == ".parquet") else None


def read_documents(file: Path, column: str) -> tuple[list[Document], int]:
    """The documents of a file, and how many records had no text.

    Args:
        file: of a kind that `kind_of` knows.
        column: of a record's text.

    Raises:
        HwpqError: the file is damaged, is of another form, or holds what is no text.
    """
    kind = kind_of(file)
    if kind in PLAIN:
        text = _decoded(file).strip()
        return ([Document(file.stem, _checked(text, str(file)))], 0) if text else ([], 1)
    records = {".json": _json, ".parquet": _parquet}.get(str(kind), _lines)(file, column)
    found, dropped = [], 0
    for where, title, value in records:
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            dropped += 1
            continue
        found.append(_document(value, title, where))
    return found, dropped


def _document(value: Any, title: str, where: str) -> Document:
    if isinstance(value, str):
        return Document(title, _checked(value.strip(), where))
    if isinstance(value, list):
        return Document(title, _checked(json.dumps(_messages(value, where), ensure_ascii=False), where), chat=True)
    raise HwpqError(
        f"its text is {type(value).__name__} and no string", where=where, remedy="Give text, or a list of messages."
    )


def _messages(value: list[Any], where: str) -> list[dict[str, str]]:
    """A chat's messages with `role` and `content`, which some data sets call `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    found = []
    for message in value:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if isinstance(content, list):  # parts, of which the text counts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise HwpqError(
                "its text is a list, but not of messages with role and content", where=where, remedy=_REMEDY
            )
        found.append({"role": roles.get(role, role), "content": content})
    return found


def _checked(text: str, where: str) -> str:
    """Text that can be written and tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HwpqError("its text holds half of a character (a lone surrogate)", where=where, remedy=_REMEDY) from error
    if "\0" in text:
        raise HwpqError("its text holds NUL characters", where=where, remedy=_REMEDY)
    return text


def _decoded(file: Path) -> str:
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix.lower() == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HwpqError(f"not UTF-8 text ({error})", where=str(file), remedy="Convert it to UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise HwpqError(f"not a whole gzip file ({error})", where=str(file), remedy="Pack it again.") from error


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HwpqError(f"not valid JSON ({error})", where=where, remedy=_REMEDY) from error


def _field(record: Any, column: str, where: str, title: str) -> tuple[str, str, Any]:
    if isinstance(record, str):
        return where, title, record
    if not isinstance(record, dict):
        raise HwpqError(
            f"{type(record).__name__} where an object is wanted",
            where=where,
            remedy=f'Write it as {{"{column}": "…"}}.',
        )
    if column not in record:
        raise _no_column(column, record, where)
    return where, str(record.get("title") or title), record[column]


def _no_column(column: str, columns: Iterable[Any], where: str) -> HwpqError:
    names = [str(name) for name in columns]
    nearest = get_close_matches(column, names, n=1)
    named = f"Name the column with corpus.column{f', perhaps {nearest[0]}' if nearest else ''}."
    return HwpqError(f"no column {column} among {', '.join(names[:12]) or 'none'}", where=where, remedy=named)


def _lines(file: Path, column: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(_decoded(file).split("\n"), start=1):  # not splitlines: U+2028 may stand in a text
        if line.strip():
            where = f"{file}, line {number}"
            yield _field(_loaded(line, where), column, where, f"{file.name.split('.')[0]} {number}")


def _json(file: Path, column: str) -> Iterator[tuple[str, str, Any]]:
    found = _loaded(_decoded(file), str(file))
    if isinstance(found, dict):  # one record
        found = [found]
    if not isinstance(found, list):
        raise HwpqError("not an array of records", where=str(file), remedy="Write it as an array of objects.")
    for number, record in enumerate(found, start=1):
        yield _field(record, column, f"{file}, record {number}", f"{file.name.split('.')[0]} {number}")


def _parquet(file: Path, column: str) -> Iterator[tuple[str, str, Any]]:
    frame = read_parquet(file)
    if column not in frame:
        raise _no_column(column, frame.columns, str(file))
    titles = frame["title"] if "title" in frame else [f"{file.stem} {row}" for row in range(len(frame))]
    for row, (title, value) in enumerate(zip(titles, frame[column], strict=True)):
        plain = value.tolist() if hasattr(value, "tolist") else value
        yield f"{file}, row {row}", str(title), None if plain is pd.NA or plain is pd.NaT else plain


def read_parquet(file: Path) -> pd.DataFrame:
    """A Parquet file as a table.

    Raises:
        HwpqError: it is missing or damaged.
    """
    with reading(file, what="cannot be read as parquet", remedy="Fetch or make it again."):
        return pd.read_parquet(file)
