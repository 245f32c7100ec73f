"""The tokenizer of a checkpoint: one door, so that a damaged one is a line wherever it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.errors import HwpqError, reading

_REMEDY = "Use a checkpoint that has its tokenizer.json beside the weights."
#: What configs call their largest number of positions, where transformers does not map it to the common name.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        HwpqError: there is none, it is damaged, or it needs remote code.
    """
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise HwpqError("no such directory", where=str(directory), remedy="Run the fetch step first.")
    with reading(directory, what="no usable tokenizer", remedy=_REMEDY):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def check_length(directory: str | Path, length: int, where: str) -> None:
    """Refuse samples that are longer than a model has positions.

    Beyond them a model with learned positions fails, and one with rotary ones was never trained. Models without
    positions (recurrences, ALiBi) take any length.

    Args:
        directory: the checkpoint; without a config nothing is checked.
        length: tokens in a sample.
        where: the parameter, for the error.

    Raises:
        HwpqError: the length is over the model's.
    """
    if not (Path(directory) / "config.json").is_file():
        return
    most = most_positions(directory)
    if most is not None and length > most:
        raise HwpqError(
            f"samples of {length} tokens, and the model has {most} positions",
            where=where,
            remedy=f"Use samples of at most {most} tokens.",
        )


def most_positions(directory: str | Path) -> int | None:
    """The largest number of positions of a checkpoint's text model; None where none limits it."""
    from transformers import AutoConfig

    read_json(Path(directory) / "config.json")
    with reading(f"{directory}/config.json", what="not a config", remedy="Fetch the model again."):
        config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config(decoder=True)
        attention = getattr(text, "attn_config", None)
        if text.model_type == "bloom" or getattr(text, "alibi", False) or getattr(attention, "alibi", False):
            return None
        found = (getattr(text, name, None) for name in _POSITIONS)
        return next((int(value) for value in found if isinstance(value, int) and value > 0), None)
