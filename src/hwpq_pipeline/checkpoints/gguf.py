"""A GGUF file as a Hugging Face checkpoint.

transformers unpacks GGUF's blocks (Q4_1 and the like: `w = d·q + m` a block of 32) into plain tensors; what
is left to do is to forget that the model was quantized, to write tied embeddings once, and to mend the
tokenizer: GGUF keeps the vocabulary and names the pre-tokenizer, and transformers builds GPT-2's for all of
them. SmolLM splits digits one by one before GPT-2's pattern, so that numbers are read as in training (on
Wikipedia text the difference is small: 1.1827 for 1.1831 bits a byte).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.layers import map_model
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import read_json
from hwpq_pipeline.checkpoints.writer import write_json, write_text, write_weights
from hwpq_pipeline.errors import HwpqError, first_line

#: Pre-tokenizers by GGUF's name, in the `tokenizers` library's form.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


def convert_gguf(file: Path, target: Path, dtype: torch.dtype) -> str:
    """Write a GGUF model to the directory `target` as config, safetensors and tokenizer.

    Args:
        file: the GGUF file.
        target: an existing directory.
        dtype: of the weights on disk.

    Returns:
        The licence that the file names, or `unknown`.

    Raises:
        HwpqError: the file is corrupt, of an architecture that transformers cannot read, or holds NaN.
    """
    with _parsed_once():
        fields = _fields(file)
        with quiet_transformers():
            model, tokenizer = _load(file, dtype)
    _write_model(model, target, dtype, file)
    _write_tokenizer(tokenizer, target, str(fields.get("tokenizer.ggml.pre")), model.config)
    return str(fields.get("general.license") or "unknown")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse a file once while this lasts.

    transformers parses it anew for the config, the weights and the tokenizer, and offers no way to hand a reader over;
    a vocabulary of 49 thousand tokens takes ten seconds each time.
    """
    import gguf

    original = gguf.GGUFReader
    readers: dict[tuple[Any, ...], Any] = {}

    def reader(path: str | Path, *mode: Any) -> Any:
        key = (os.path.realpath(path), *mode)
        if key not in readers:
            readers[key] = original(path, *mode)
        return readers[key]

    vars(gguf)["GGUFReader"] = reader
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = original


def _fields(file: Path) -> dict[str, Any]:
    """The small header fields that are used here."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        wanted = ("general.license", "tokenizer.ggml.pre")
        return {name: reader.fields[name].contents() for name in wanted if name in reader.fields}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise HwpqError(
            f"corrupt GGUF file ({error})", where=str(file), remedy="Fetch it again, or correct the path."
        ) from error


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        # A dense copy is asked for: otherwise an installed kernel package would keep the blocks packed.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **where
        )
        return model, AutoTokenizer.from_pretrained(file.parent, **where)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise HwpqError(
            f"transformers cannot read this GGUF file ({first_line(error)[:300]})",
            where=str(file),
            remedy="Use a checkpoint directory of the model, or a GGUF of a supported architecture.",
        ) from error


def _write_model(model: Any, target: Path, dtype: torch.dtype, file: Path) -> None:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(target)
    plain = read_json(target / "config.json")
    plain.pop("_model_name_or_path", None)
    write_json(target / "config.json", plain)
    model.generation_config.save_pretrained(target)
    state = model.state_dict()
    names = sorted(name for name in state if name not in map_model(model, where=str(file)).tied)

    def finite(name: str) -> torch.Tensor:
        tensor: torch.Tensor = state[name]
        if not bool(torch.isfinite(tensor).all()):
            raise HwpqError("weights are NaN or infinite", where=f"{file}: {name}", remedy="Fetch the file again.")
        return tensor

    write_weights(target, names, {name: tuple(state[name].shape) for name in names}, finite, dtype)


def _write_tokenizer(tokenizer: Any, target: Path, pre: str, config: Any) -> None:
    tokenizer.save_pretrained(target)
    if pre in _PRE_TOKENIZERS:
        content = read_json(target / "tokenizer.json")
        content["pre_tokenizer"] = _PRE_TOKENIZERS[pre]
        write_text(target / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False))
    settings = read_json(target / "tokenizer_config.json")
    for local in ("backend", "is_local", "local_files_only"):
        settings.pop(local, None)
    # The name that every version of transformers, and every engine, reads tokenizer.json under.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = config.max_position_embeddings
    write_json(target / "tokenizer_config.json", settings)
