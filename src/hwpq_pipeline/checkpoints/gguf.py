"""A GGUF file as a Hugging Face checkpoint.

transformers unpacks GGUF's blocks (for example Q4_1: `w = d·q + m`, 32 weights a block) into plain tensors. Three
things are left to do here. The config must forget that the model was quantized, tied embeddings are written once, and
the tokenizer is mended: a GGUF file only names the pre-tokenizer, and transformers builds GPT-2's for every name.
SmolLM splits off digits one by one before GPT-2's pattern, so that numbers are read as in training. (On Wikipedia
text the difference is small: 1.1827 against 1.1831 bits a byte.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.gguf_header import check_header
from hwpq_pipeline.checkpoints.json_file import read_json
from hwpq_pipeline.checkpoints.layers import tied_parameters
from hwpq_pipeline.checkpoints.pre_tokenizers import rule_of
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.writer import write_json, write_text, write_weights
from hwpq_pipeline.errors import HwpqError, reading


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
    check_header(file)
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

    transformers parses it again for the config, for the weights and for the tokenizer, and offers no way to give it a
    reader. A vocabulary of 49 thousand tokens takes ten seconds each time.
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
    """The header fields that are used here."""
    from gguf import GGUFReader

    with reading(file, what="corrupt GGUF file", remedy="Fetch it again, or correct the path."):
        reader = GGUFReader(file)
        wanted = ("general.license", "tokenizer.ggml.pre")
        return {name: reader.fields[name].contents() for name in wanted if name in reader.fields}


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    remedy = "Use a checkpoint directory of the model, or a GGUF of a supported architecture."
    with reading(file, what="transformers cannot read this GGUF file", remedy=remedy):
        # Ask for a dense copy: otherwise an installed kernel package would keep the blocks packed.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **where
        )
        return model, AutoTokenizer.from_pretrained(file.parent, **where)


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
    tied = tied_parameters(model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(set(state) - set(tied)):
            tensor: torch.Tensor = state[name]
            if not bool(torch.isfinite(tensor).all()):
                raise HwpqError("weights are NaN or infinite", where=f"{file}: {name}", remedy="Fetch the file again.")
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    write_weights(target, tensors())


def _write_tokenizer(tokenizer: Any, target: Path, pre: str, config: Any) -> None:
    tokenizer.save_pretrained(target)
    if (rule := rule_of(pre)) is not None:
        content = read_json(target / "tokenizer.json")
        content["pre_tokenizer"] = rule
        write_text(target / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False))
    settings = read_json(target / "tokenizer_config.json")
    for local in ("backend", "is_local", "local_files_only"):
        settings.pop(local, None)
    # Every version of transformers, and every engine, reads tokenizer.json by this name.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = config.max_position_embeddings
    write_json(target / "tokenizer_config.json", settings)
