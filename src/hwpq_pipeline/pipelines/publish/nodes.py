"""The node that completes the model cards, and uploads the exports if a repository is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.writer import write_text
from hwpq_pipeline.export.measured import with_quality
from hwpq_pipeline.export.publish import push_to_hub
from hwpq_pipeline.parameters import Export


def publish(export: Path, formats: Path, metrics: dict[str, Any], name: str, parameters: Export, scratch: Path) -> Path:
    """A directory with the card of every export, the measured quality in it: `README.md`, and `<format>/README.md`.

    With `push_to_hub: owner/model` the exports are uploaded to `owner/model-<variant>` and
    `owner/model-<variant>-<format>`.
    """
    target = scratch / "cards"
    others = sorted(path for path in formats.iterdir() if path.is_dir())
    for folder in (export, *others):
        card = with_quality((folder / "README.md").read_text(encoding="utf-8"), metrics)
        inner = "" if folder == export else folder.name
        (target / inner).mkdir(parents=True)
        write_text(target / inner / "README.md", card)
        if parameters.push_to_hub:
            repo = "-".join(part for part in (parameters.push_to_hub, name, inner) if part)
            logging.getLogger(__name__).info("%s is at %s", name, push_to_hub(folder, card, repo))
    return target
