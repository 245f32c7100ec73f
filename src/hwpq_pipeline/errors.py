"""The one error that users of the pipeline see: what is wrong, where, and the remedy, in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hwpq_pipeline.inert import plain

_OF_THE_MACHINE = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EIO)


class HwpqError(Exception):
    """Something the user can mend.

    Args:
        what: what is wrong, naming the value.
        where: the layer, file, parameter or variant it was found in.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str, remedy: str) -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        return " ".join(plain(f"{self.where}: {self.what}. {self.remedy}").split())


@contextmanager
def reading(where: Any, *, remedy: str, what: str = "cannot be read") -> Iterator[None]:
    """Turn whatever a library raises while it reads a user's file into one line.

    Libraries raise what they like on damaged input, a bare `Exception` included, so no list of classes is ever whole.
    Errors of ours, of the system (a disk, a right), and those that end a process pass as they are.

    Args:
        where: the file.
        remedy: what to do about it.
        what: what is wrong; the library's own words follow.

    Raises:
        HwpqError: in the place of the library's error.
    """
    try:
        yield
    except (HwpqError, MemoryError):
        raise
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            raise
        raise HwpqError(f"{what} ({said(error)})", where=str(where), remedy=remedy) from error
    except Exception as error:
        raise HwpqError(f"{what} ({said(error)})", where=str(where), remedy=remedy) from error


def said(error: BaseException) -> str:
    """What a library says of its error, in at most 200 printable characters."""
    return plain(first_line(error))[:200].strip().rstrip(".") or type(error).__name__


def first_line(error: BaseException) -> str:
    """What a library says of its error, first line only; its class where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
