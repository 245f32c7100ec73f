"""The finished parts of a stage's result: each is a file of tensors and what there is to tell of it.

A part is written by the process that made it, so results travel as files and not between processes. Its JSON file comes
last: where it is, the part is whole. A part that a power cut left damaged is as good as none, since every tensor has a
checksum. The stage's result takes the files by hard links, so that nothing is copied, and nothing is lost if the stage
is killed while its result is moved into place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.reader import read_tensors
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors, write_text
from hwpq_pipeline.errors import HwpqError


class Parts:
    """Finished parts in a folder. It pickles, and holds no more than the folder's path.

    Args:
        folder: is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Write a part.

        Args:
            name: of the part.
            tensors: by name; without any, no file is written.
            told: what there is to tell of it, in plain values; NaN and infinity are kept.
        """
        if tensors:
            write_tensors(self.tensors(name), tensors)
        write_text(self._told(name), json.dumps({"tensors": bool(tensors), "told": told}))

    def told(self, name: str) -> dict[str, Any]:
        """What there is to tell of a finished part."""
        found: dict[str, Any] = json.loads(self._told(name).read_text(encoding="utf-8"))["told"]
        return found

    def is_whole(self, name: str) -> bool:
        """Whether a part is finished, and its tensors have the bytes that were written; they are read."""
        try:
            found = json.loads(self._told(name).read_text(encoding="utf-8"))
            if found["tensors"]:
                read_tensors(self.tensors(name))
        except (OSError, ValueError, KeyError, TypeError, HwpqError):
            return False
        return True

    def hand_over(self, name: str, target: Path) -> bool:
        """Put a part's file of tensors at `target`, beside which it stays here; false if it has none."""
        if not self.tensors(name).is_file():
            return False
        target.unlink(missing_ok=True)
        try:
            os.link(self.tensors(name), target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(self.tensors(name), target)
        return True

    def tensors(self, name: str) -> Path:
        """The file of a part's tensors."""
        return self.folder / f"{name}.safetensors"

    def _told(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def kept_json(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a JSON file holds; where it is missing or damaged, it is made and written."""
    try:
        return read_json(file)
    except HwpqError:
        made = make()
        write_json(file, made)
        return made
