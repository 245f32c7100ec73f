"""The one error that users of the pipeline see: what is wrong, where, and the remedy, in one line."""

from __future__ import annotations


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
        return " ".join(f"{self.where}: {self.what}. {self.remedy}".split())


def first_line(error: BaseException) -> str:
    """What a library says of its error, first line only; its class where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
