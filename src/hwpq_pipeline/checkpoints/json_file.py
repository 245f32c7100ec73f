"""Reading JSON that a user, or an earlier stage, has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hwpq_pipeline.errors import HwpqError, said

#: What a user does about a file that is missing or damaged.
FETCH_AGAIN = "Fetch or make it again: remove the directory and run the step that writes it."


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        HwpqError: the file is missing or a folder, or is not a JSON object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character could not be written again
    except (FileNotFoundError, NotADirectoryError) as error:  # the latter where its folder is a file
        raise HwpqError("no such file", where=str(path), remedy=FETCH_AGAIN) from error
    except IsADirectoryError as error:
        raise HwpqError("a folder, and no file", where=str(path), remedy=FETCH_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise HwpqError(f"not valid JSON ({said(error)})", where=str(path), remedy=FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise HwpqError("not a JSON object", where=str(path), remedy=FETCH_AGAIN)
    return value
