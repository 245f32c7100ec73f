"""The door for Python: compress a checkpoint, load what came out.

    from hwpq_pipeline import compress, load

    small = compress("models/mine", {"quantization": {"grid": "int8"}}, out="models/mine-int8")
    model = load(small.path)

`compress` takes the steps of the pipelines `calibrate`, `select`, `compress` and `export` on one model, without
Kedro. It writes the same bytes. What it does not do is evaluate: for figures, compare variants with `kedro run`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwpq_pipeline.calibration.statistics import collect_statistics
from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.packed import is_packed
from hwpq_pipeline.corpus.chat import as_text
from hwpq_pipeline.corpus.documents import CorpusSource, fetch_corpus, read_corpus
from hwpq_pipeline.corpus.samples import draw_samples, token_matrix
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.kernels.devices import choose_device
from hwpq_pipeline.method.fitting import misfits
from hwpq_pipeline.method.healed import samples_needed, write_healed
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.processes import temporary_folder
from hwpq_pipeline.work.locks import held

Tokens = np.ndarray[Any, Any] | torch.Tensor


@dataclass(frozen=True)
class Compressed:
    """What `compress` made.

    Attributes:
        path: the export, which `load`, transformers and vLLM open.
        recipe: what was done, every number written out; the export's `recipe.json` holds it too.
        layers: facts by layer name: `reached_sparsity`, `error_recovered`, …
        seconds: it took.
    """

    path: Path
    recipe: Recipe
    layers: Mapping[str, Mapping[str, Any]]
    seconds: float


def compress(  # noqa: PLR0913 (each is a choice of the user)
    model_dir: str | Path,
    recipe: Recipe | Mapping[str, Any],
    *,
    out: str | Path,
    calibration: str | Path | Tokens | None = None,
    samples: int = 32,
    length: int = 512,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> Compressed:
    """Compress a Hugging Face checkpoint into one that stock engines load.

    Args:
        model_dir: the dense checkpoint: config, safetensors, tokenizer.
        recipe: a `Recipe`, or a variant as in `conf/base/parameters_variants.yml` (`selection`, `recovery`,
            `quantization`, `sequential`, `budget`, `healing`).
        out: directory of the export. An earlier export there is replaced, and only by a complete new one; any other
            directory with files in it is refused.
        calibration: text to calibrate on (a file of text, JSON or Parquet, or a directory of them), or token ids of
            shape (samples, length). Needed by recipes that select, recover, round by coordinate descent or run in
            sequence.
        samples, length, seed: what is drawn from the text: windows of `length` tokens from every second document.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the calibration's forward pass: `auto` (bfloat16 where the hardware multiplies it), `float32`,
            `bfloat16`.

    Raises:
        HwpqError: a variant that contradicts itself, a model or text that cannot be used, no calibration where it is
            needed.
    """
    begun = time.perf_counter()
    made = recipe if isinstance(recipe, Recipe) else _resolved(recipe)
    if found := misfits(made, layer_map(model_dir), "compress"):
        raise found[0]
    place = choose_device(device, where="compress")
    target = _free(Path(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        held(target.with_name(f".{target.name}.lock"), str(target)),
        temporary_folder(target.parent, f".{target.name}.") as scratch,
    ):
        statistics = tokens = None
        if made.needs_text:
            tokens = _tokens(model_dir, calibration, scratch, samples=samples, length=length, seed=seed)
            mode = "gram" if made.needs_gram else "diagonal"
            statistics = scratch / "statistics"
            collect_statistics(model_dir, tokens, target=statistics, mode=mode, keep="auto", dtype=dtype, device=place)
        healing_text = None
        if made.healing is not None:
            healing_text = _tokens(
                model_dir,
                calibration,
                scratch,
                samples=samples_needed(made, length),
                length=length,
                seed=made.healing.seed,
            )
        neutral = scratch / "compressed"
        neutral.mkdir()
        facts = write_model(model_dir, statistics, made, neutral, name=target.name, tokens=tokens, device=place)
        if healing_text is not None:
            neutral = _healed(model_dir, neutral, made, healing_text, place)
        export_checkpoint(model_dir, neutral, target)
        done = Recipe.from_json(CompressedModel(neutral).recipe)
    return Compressed(target, done, facts, time.perf_counter() - begun)


def load(directory: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """An export as a causal LM in evaluation mode; `generate` works as with any other.

    Args:
        directory: a compressed-tensors export, or a packed 2:4 one (`semi-structured`).
        device: where it runs.
        dtype: that it runs in. A packed export stays packed on the CPU, and everything else of it is float32 there.

    Raises:
        HwpqError: no such checkpoint, or a damaged one.
    """
    directory = Path(directory)
    if is_packed(directory):
        from hwpq_pipeline.runtime import load_packed

        return load_packed(directory, device, dtype)
    from hwpq_pipeline.decoder.loading import load_dense

    return load_dense(directory, dtype, torch.device(device))


def _free(target: Path) -> Path:
    """The directory to write, which may hold an earlier export and nothing else: writing replaces it whole."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "recipe.json").is_file()):
        raise HwpqError(
            "it is there already and is no export of ours", where=str(target), remedy="Name another place with out=."
        )
    return target


def _healed(model_dir: str | Path, compressed: Path, recipe: Recipe, tokens: Tokens, device: torch.device) -> Path:
    target = compressed.with_name("healed")
    target.mkdir()
    states = compressed.with_name("states")
    write_healed(model_dir, compressed, recipe, target, tokens=tokens, states=states, device=device)
    return target


def _resolved(variant: Mapping[str, Any]) -> Recipe:
    from pydantic import ValidationError

    from hwpq_pipeline.variant import Variant

    try:
        checked = Variant.model_validate({"description": "", **variant})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, ("recipe", *problem["loc"])))
        raise HwpqError(
            problem["msg"].removeprefix("Value error, "), where=where, remedy="Mend the variant."
        ) from error
    return Recipe.from_variant(checked.model_dump())


def _tokens(
    model_dir: str | Path,
    calibration: str | Path | Tokens | None,
    scratch: Path,
    *,
    samples: int,
    length: int,
    seed: int,
) -> Tokens:
    """Token ids, shape (samples, length): those given, or drawn from the text."""
    if calibration is None:
        raise HwpqError(
            "this recipe needs text to calibrate on",
            where="compress",
            remedy="Give calibration=: a text file, a directory of them, or token ids of shape (samples, length).",
        )
    if not isinstance(calibration, str | Path):
        return calibration
    corpus = fetch_corpus(CorpusSource(kind="local", path=str(calibration)), scratch / "corpus", scratch)
    documents = as_text(read_corpus(corpus), model_dir)
    drawn = draw_samples(documents, model_dir, split="calibration", samples=samples, length=length, seed=seed)
    return token_matrix(drawn)
