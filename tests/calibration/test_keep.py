"""`calibration.keep`: what is on disk, what `auto` decides, and what it says."""

from __future__ import annotations

import json
import logging
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.calibration.keep import decide, squared_inputs
from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.errors import HwpqError
from tests.beyond_linear import gpt_oss, mixtral
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_tokens

Usage = namedtuple("Usage", "total used free")
TOKENS = tiny_tokens(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m")


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, int(size)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_diagonals_are_those_of_the_matrices(model: Path, tmp_path: Path, dtype: str) -> None:
    """To the byte: masks are chosen by them."""
    for keep in ("sums", "nothing"):
        collect_statistics(model, TOKENS, target=tmp_path / keep, keep=keep, dtype=dtype, batch=2)
    for file in (tmp_path / "sums").glob("block_*.safetensors"):
        kept, left = load_file(file), load_file(tmp_path / "nothing" / file.name)
        assert left.keys() == {name for name in kept if name.endswith(".energy")}
        assert all(torch.equal(left[name], kept[name]) for name in left)


def test_the_index_and_the_tokens_say_how_to_sum_again(model: Path, tmp_path: Path) -> None:
    collect_statistics(model, TOKENS, target=tmp_path / "s", keep="nothing", dtype="bfloat16", batch=3)
    found = Statistics(tmp_path / "s")
    assert (found.mode, found.keep, found.dtype, found.batch, found.every_expert) == (
        "gram", "nothing", "bfloat16", 3, False,
    )  # fmt: skip
    assert torch.equal(found.token_ids(), TOKENS)
    assert found.tokens == TOKENS.numel()
    assert found.block_of("model.layers.1.mlp.up_proj") == 1
    with pytest.raises(HwpqError, match=r"diagonal only.*Set calibration\.keep to sums"):
        found.gram("model.layers.0.mlp.down_proj")
    (tmp_path / "s" / "tokens.safetensors").unlink()
    with pytest.raises(HwpqError, match=r"tokens\.safetensors: no such file"):
        Statistics(tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    (tmp_path / "s" / "index.json").write_text(json.dumps(index | {"keep": "some"}))
    with pytest.raises(HwpqError, match=r"not an index of statistics \(keep some\)"):
        Statistics(tmp_path / "s")
    del index["batch"]
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    with pytest.raises(HwpqError, match=r"not an index of statistics \('batch'\)"):
        Statistics(tmp_path / "s")


def test_statistics_of_an_earlier_version_hold_their_sums(model: Path, tmp_path: Path) -> None:
    collect_statistics(model, TOKENS, target=tmp_path / "s", dtype="float32")
    file = tmp_path / "s" / "index.json"
    index = json.loads(file.read_text())
    assert index.pop("keep") == "sums"
    file.write_text(json.dumps(index))
    assert Statistics(tmp_path / "s").gram("model.layers.0.mlp.down_proj").shape == (64, 64)


@pytest.mark.parametrize(("share", "kept"), [(0.49, True), (0.51, False)])
def test_auto_keeps_what_takes_half_of_the_free_space(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float,
    kept: bool,
) -> None:  # fmt: skip
    needed = 2 * 4 * (3 * 32**2 + 64**2)
    free(monkeypatch, needed / share)
    with caplog.at_level(logging.INFO):
        collect_statistics(model, TOKENS, target=tmp_path / "s", keep="auto", dtype="float32")
    assert Statistics(tmp_path / "s").keep == ("sums" if kept else "nothing")
    (line,) = [record.getMessage() for record in caplog.records if "calibration.keep" in record.getMessage()]
    assert line.startswith("The Gram matrices take some 5.73e-05 GB, and the disk has 0.0001")
    assert line.endswith("auto they are kept." if kept else "each variant that needs them sums them again.")


def test_who_decides_is_not_told_what_he_decided(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free(monkeypatch, 1)
    with caplog.at_level(logging.INFO):
        collect_statistics(model, TOKENS, target=tmp_path / "kept", keep="sums", dtype="float32")
        collect_statistics(model, TOKENS, target=tmp_path / "diagonal", mode="diagonal", keep="auto", dtype="float32")
    assert "calibration.keep" not in caplog.text
    assert Statistics(tmp_path / "kept").keep == "sums"
    assert Statistics(tmp_path / "diagonal").mode == "diagonal"
    with pytest.raises(HwpqError, match="unknown keep all"):
        decide("all", layer_map(model), tmp_path)


def configs() -> dict[str, Any]:
    from transformers import GPT2Config, Qwen3Config

    return {
        "llama": tiny_config(),
        "qwen3": Qwen3Config(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        ),
        "gpt2": GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "mixtral": mixtral(),
        "gpt_oss": gpt_oss(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "gpt_oss"])
def test_the_size_is_known_before_they_are_made(name: str, tmp_path: Path) -> None:
    """Against the matrices that a run makes, experts' own included."""
    tiny_model(configs()[name]).save_pretrained(tmp_path / "model")
    collect_statistics(tmp_path / "model", TOKENS, target=tmp_path / "s", dtype="float32")
    made = sum(group.features**2 for group in Statistics(tmp_path / "s").groups())
    assert squared_inputs(layer_map(tmp_path / "model")) == made
