from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.sources import ModelSource, fetch_model
from hwpq_pipeline.errors import HwpqError
from tests.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokens

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight as GGUF has them: the two halves of each head's rotation, interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model, pre: str = "smollm") -> Path:
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["1 2"])
    for name, identity in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(identity)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleaved(weight, heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_model_and_tokenizer_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(tiny_config())
    file = write_gguf(tmp_path / "tiny.gguf", model)
    target = fetch_model(ModelSource("gguf", path=str(file)), tmp_path / "out", tmp_path, "float32")
    assert capsys.readouterr().err == ""
    stored = load_file(target / "model.safetensors")
    state = model.state_dict()
    assert set(stored) == set(state) - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert torch.equal(tensor, state[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits, atol=1e-5)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert json.loads((target / "source.json").read_text())["license"] == "apache-2.0"
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template
    # SmolLM splits digits one by one, whatever the merges say.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12").input_ids) == ["a", "1", "2"]


def test_the_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *arguments: Any) -> None:
            parsed.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    fetch_model(ModelSource("gguf", path=str(file)), tmp_path / "out", tmp_path)
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted  # as it was


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["0", "0", "1", "2"]),  # each digit alone
        ("llama-bpe", ["0", "0", "1", "2"]),  # three digits at most: 001, 2
        ("gpt-2", ["0", "0", "12"]),
        ("some other", ["0", "0", "12"]),  # as transformers makes it
    ],
)
def test_text_is_cut_as_the_file_s_pre_tokenizer_says(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(), pre=pre)
    target = fetch_model(ModelSource("gguf", path=str(file)), tmp_path / "out", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.convert_ids_to_tokens(tokenizer("0012").input_ids) == tokens


def test_corrupt_and_wrong_files(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with pytest.raises(HwpqError, match="wrong sha256"):
        fetch_model(ModelSource("gguf", path=str(file), sha256="0" * 64), tmp_path / "out", tmp_path)
    content = file.read_bytes()
    for damaged in (b"GGUX" + content[4:], content[: len(content) // 2], content[:20]):
        file.write_bytes(damaged)
        with pytest.raises(HwpqError, match=r"tiny\.gguf"):
            fetch_model(ModelSource("gguf", path=str(file)), tmp_path / "out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_non_finite_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    file = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(HwpqError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        fetch_model(ModelSource("gguf", path=str(file)), tmp_path / "out", tmp_path)
