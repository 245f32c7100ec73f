from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.sources import ModelSource, fetch_model
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(tiny_tokens()).logits


def test_directory_gives_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny_checkpoint(tmp_path / "source", max_shard_size="10KB")
    (source / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    target = fetch_model(ModelSource("directory", path=str(source), name="tiny"), tmp_path / "out", tmp_path, "float32")
    assert torch.equal(logits(target), logits(source))
    assert not list(target.glob("*.bin"))
    facts = json.loads((target / "source.json").read_text())
    assert (facts["kind"], facts["name"], facts["license"]) == ("directory", "tiny", "mit")
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("seven maps").input_ids) == "seven maps"


def test_tied_embeddings_are_written_once_and_cast(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    target = fetch_model(ModelSource("directory", path=str(source)), tmp_path / "out", tmp_path)
    written = Checkpoint(target)
    assert "lm_head.weight" not in written
    assert (written.dtype, written.config["dtype"]) == ("BF16", "bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written.tensor(name), tensors[name].bfloat16())
    tensors["lm_head.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HwpqError, match="values differ"):
        fetch_model(ModelSource("directory", path=str(source)), tmp_path / "out2", tmp_path)


def test_untied_head_is_kept(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", tiny_config(tie_word_embeddings=False))
    target = fetch_model(ModelSource("directory", path=str(source)), tmp_path / "out", tmp_path, "float32")
    assert torch.equal(logits(target), logits(source))


def not_finite(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][1, 2] = float("inf")
    save_file(tensors, source / "model.safetensors")


def truncated(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def other_shape(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def lacking(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, source / "model.safetensors")


def quantized(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_finite, r"embed_tokens\.weight.*NaN or infinite"),
        (truncated, "corrupt"),
        (pickled, "safetensors; pickled"),
        (other_shape, r"\(64, 32\), the config asks for \(128, 32\)"),
        (lacking, r"no tensor model\.layers\.1\.input_layernorm\.weight"),
        (quantized, "quantized already"),
    ],
)
def test_bad_checkpoints_leave_the_good_target(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    target = fetch_model(ModelSource("directory", path=str(source)), tmp_path / "out", tmp_path)
    before = (target / "model.safetensors").read_bytes()
    damage(source)
    with pytest.raises(HwpqError, match=message):
        fetch_model(ModelSource("directory", path=str(source)), target, tmp_path)
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "source"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelSource("directory", path="nowhere"), "nowhere: no such directory"),
        (ModelSource("gguf", path="nowhere.gguf"), "nowhere.gguf: no such GGUF"),
        (ModelSource("directory"), "kind directory needs path"),
        (ModelSource("floppy"), "unknown kind floppy"),
    ],
)
def test_missing_sources(tmp_path: Path, source: ModelSource, message: str) -> None:
    with pytest.raises(HwpqError, match=message):
        fetch_model(source, tmp_path / "out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hub(tmp_path: Path, hub: Path) -> None:
    source = tiny_checkpoint(hub / "models" / "me" / "tiny")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    target = fetch_model(
        ModelSource("hub", repo="me/tiny", revision="main"), tmp_path / "out", tmp_path / "cache", "float32"
    )
    assert torch.equal(logits(target), logits(source))
    assert not list((tmp_path / "cache").rglob("*.bin"))
    facts = json.loads((target / "source.json").read_text())
    assert facts["repo"] == "me/tiny"
    assert len(facts["commit"]) == 40
    with pytest.raises(HwpqError, match="hub repository me/none"):
        fetch_model(ModelSource("hub", repo="me/none"), tmp_path / "none", tmp_path / "cache")
    assert not (tmp_path / "none").exists()


def test_hub_that_does_not_answer(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HwpqError, match="hub repository me/tiny"):
        fetch_model(ModelSource("hub", repo="me/tiny"), tmp_path / "out", tmp_path / "cache")
