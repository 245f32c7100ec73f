"""Where a stage keeps what it has finished: beside the results, since DVC removes those before it runs a stage.

    data/.work/compress.int4/<key>/

One folder for each stage and variant, and in it one for the key (`content`) of what is being made. Those of other keys
are of other inputs, settings or code: nobody goes on from them, so they are removed. Once the result is in its place,
the stage's folder is removed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def open_work(root: Path, stage: str, key: str) -> Path:
    """The folder of a stage's work, which may hold what a killed run had finished.

    Args:
        root: of all stages.
        stage: with the variant's name, where there is one.
        key: of what is made (`content.work_key`).
    """
    folder = root / stage
    for other in folder.glob("*"):
        if other.name != key:
            shutil.rmtree(other, ignore_errors=True)
    found = folder / key
    if next(found.rglob("*.*"), None) is not None:
        logger.info("%s goes on from what an earlier run had finished.", stage)
    found.mkdir(parents=True, exist_ok=True)
    return found


def forget_work(root: Path, stage: str) -> None:
    """Remove a stage's work: its result is in its place."""
    shutil.rmtree(root / stage, ignore_errors=True)


def result_folder(work: Path) -> Path:
    """An empty folder in which a stage puts its result together, to be moved into place as a whole."""
    found = work / "result"
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir()
    return found
