"""The exports of `make run`, opened by the engines of their users. `make test-engines` has both made beforehand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks.engines import installed
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.corpus.samples import token_matrix
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from tests.conftest import ROOT

DATA = ROOT / "data"
MODEL = DATA / "01_raw" / "model"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
)
NEW_TOKENS = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)


@pytest.fixture(scope="module", autouse=True)
def _the_engine_is_there(request: pytest.FixtureRequest) -> None:
    needed = [engine for engine in ("vllm", "llama") if engine in request.path.stem]
    assert all(installed(engine) for engine in needed), "run it as: make test-engines"


@pytest.fixture(scope="session", autouse=True)
def _everything_is_there() -> None:
    assert (DATA / "07_export" / "paper-2of4-fp8").is_dir(), "run it as: make test-engines"


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """The prompts as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="session")
def samples() -> torch.Tensor:
    """The evaluation's tokens, (samples, length)."""
    return torch.as_tensor(token_matrix(pd.read_parquet(DATA / "02_intermediate" / "evaluation.parquet")))


@dataclass(frozen=True)
class Made:
    """A variant's compressed model and its compressed-tensors export."""

    compressed: Path
    export: Path


#: What `make run` does not make, and engines have a scheme or this project a format for.
FURTHER: dict[str, dict[str, Any]] = {
    "int8": {"quantization": {"grid": "int8"}},
    "2of4-int8-plain": {"selection": {"structure": "2of4"}, "quantization": {"grid": "int8"}},
    "2of4": {"selection": {"structure": "2of4"}},
}


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Variants by name: those of `make run`, and `FURTHER` ones, made when they are first asked for."""

    @functools.cache
    def find(name: str) -> Made:
        if name not in FURTHER:
            return Made(DATA / "06_models" / name / "model", DATA / "07_export" / name)
        compressed, export = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("exports") / name
        recipe = Recipe.from_variant(FURTHER[name])
        write_model(MODEL, DATA / "03_primary" / "statistics", recipe, compressed, name=name)
        return Made(compressed, export_checkpoint(MODEL, compressed, export))

    return find


@pytest.fixture(scope="session")
def perplexity_of_weights(
    variants: Callable[[str], Made], samples: torch.Tensor
) -> Callable[[str, int], tuple[float, list[list[int]]]]:
    """By variant and number of samples: what stock transformers finds without rounding activations, and the samples."""

    @functools.cache
    def find(name: str, count: int) -> tuple[float, list[list[int]]]:
        return perplexity(load(variants(name).export, rounding=False), samples[:count]), samples[:count].tolist()

    return find


def load(directory: Path, *, rounding: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """An export in stock transformers; without ``rounding`` the activations stay as they are."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        model(torch.tensor([[1]]))  # the first forward unpacks
    switch_rounding(model, on=rounding)
    return model


def switch_rounding(model: Any, *, on: bool) -> None:
    """Have the activations rounded, or not."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = on


def losses(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Σ −log p of every token but the first, nats: logits (length, vocabulary), ids (length)."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))


def perplexity(model: Any, samples: torch.Tensor) -> float:
    """Of a torch model on samples (count, length)."""
    with torch.inference_mode():
        total = sum(losses(model(ids[None]).logits[0], ids) for ids in samples)
    return math.exp(total / (samples.shape[0] * (samples.shape[1] - 1)))


def chosen_logits(model: Any, prompt: list[int], chosen: list[int]) -> torch.Tensor:
    """Logits from which each token after the prompt is chosen, given those before it: (tokens, vocabulary)."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt + chosen])).logits.float()
    return logits[0, len(prompt) - 1 : -1]


def missed(model: Any, prompt: list[int], chosen: list[int]) -> torch.Tensor:
    """By how much each token chosen after the prompt was behind the model's likeliest one, logits."""
    logits = chosen_logits(model, prompt, chosen)
    return logits.max(dim=1).values - logits[torch.arange(len(chosen)), torch.tensor(chosen)]


def greedy(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """New tokens by transformers' own `generate`."""
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
