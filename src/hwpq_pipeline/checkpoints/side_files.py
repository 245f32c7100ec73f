"""The files beside a checkpoint's weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

#: What users need beside the weights in any format. Config and card are not in the list: each writer makes its own.
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def copy_side_files(source: Path, target: Path, *, also: tuple[str, ...] = ()) -> None:
    """Copy a checkpoint's side files as they are.

    Args:
        source: the checkpoint.
        target: an existing directory.
        also: patterns of further files.
    """
    for pattern in (*SIDE_FILES, *also):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
