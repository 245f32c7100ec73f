"""The exports of `make run`, opened by the engines of their users. `make test-engines` has both made beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engines import installed
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import write_json, write_tensors
from hwpq_pipeline.compression.rounding import quantize
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from tests.conftest import ROOT

MODEL = ROOT / "data" / "01_raw" / "model"
EXPORTS = ROOT / "data" / "07_export"
COMPRESSED = ROOT / "data" / "06_models"
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


@pytest.fixture(scope="session", autouse=True)
def _everything_is_there() -> None:
    assert all(installed(engine) for engine in ("vllm", "llama")), "run it as: make test-engines"
    assert (EXPORTS / "paper-2of4-fp8").is_dir(), "run it as: make test-engines"


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """The prompts as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An INT8 variant, which `make run` does not make: compressed model and export."""
    folder = tmp_path_factory.mktemp("int8")
    compressed, dense = folder / "compressed", Checkpoint(MODEL)
    compressed.mkdir()
    tensors, layers = {}, layer_map(MODEL).names
    for layer in layers:
        found = quantize(dense.weight(layer), "int8", scale_dtype=torch.bfloat16, where=layer)
        tensors[f"{layer}.codes"], tensors[f"{layer}.scale"] = found.codes, found.scale
    write_tensors(compressed / "layers.safetensors", tensors)
    write_json(
        compressed / "recipe.json",
        {"variant": "int8", "grid": "int8", "group_size": None, "structure": "dense", "layers": layers},
    )
    return compressed, export_checkpoint(MODEL, compressed, folder / "int8")


def load(directory: Path) -> Any:
    """An export in stock transformers, float32."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy(model: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """New tokens by transformers' own `generate`."""
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
