"""llama.cpp loads the GGUF exports, tokenizes and generates, and is as good on the same tokens."""

from __future__ import annotations

import math

import pytest

from benchmarks.engines import ask
from hwpq_pipeline.export.gguf import export_gguf
from tests.engines.conftest import MODEL, NEW_TOKENS, PROMPTS, load, missed

SAMPLES = 4
CASES = [
    ("dense", False, "F16"), ("fp8", False, "Q8_0"), ("fp8", True, "F16"), ("int4", False, "Q4_0"),
    ("int8", False, "Q8_0"), ("2of4-fp8", False, "Q8_0"), ("2of4-int4", False, "Q4_0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, variants):
    """GGUF files by (variant, float16), made when first asked for."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def make(variant: str, float16: bool = False):
        if (variant, float16) not in made:
            directory = export_gguf(
                MODEL, variants(variant).compressed, folder / f"{variant}-{float16}", float16=float16
            )
            (made[variant, float16],) = directory.glob("*.gguf")
        return made[variant, float16]

    return make


@pytest.mark.parametrize(("variant", "float16", "kind"), CASES)
def test_perplexity_is_ours_within_one_percent(variant, float16, kind, files, perplexity_of_weights):
    """Ours: the same weights in transformers, float32, activations not rounded (GGUF has no such thing)."""
    ours, samples = perplexity_of_weights(variant, SAMPLES)
    file = files(variant, float16)
    assert kind in file.name
    answer = ask("llama", {"model": file, "samples": samples})
    theirs = math.exp(answer["nll"] / answer["predictions"])
    print(f"perplexity {variant} {kind}: ours {ours:.4f}, llama.cpp {theirs:.4f}, {theirs / ours - 1:+.3%}")  # noqa: T201
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(("variant", "float16"), [("dense", False), ("fp8", True), ("int4", False)])
def test_it_generates_what_transformers_generates(variant, float16, files, prompts, variants):
    """Where rounding differs, from the first token that was as good as the other on; F16 hardly rounds."""
    tokens = ask("llama", {"model": files(variant, float16), "prompts": prompts, "new_tokens": NEW_TOKENS})["tokens"]
    model = load(variants(variant).export, rounding=False)
    for prompt, theirs in zip(prompts, tokens, strict=True):
        assert len(theirs) == NEW_TOKENS
        behind = missed(model, prompt, theirs)
        print(f"llama.cpp {variant}: missed by {float(behind.max()):.4f}")  # noqa: T201
        assert float(behind.max()) < (0.05 if float16 or variant == "dense" else 0.5), (theirs, behind)


def test_its_tokenizer_is_the_model_s(files):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [
        *PROMPTS, "1984 was 40 years before 2024.", "naïve café — “quotes” …", "  two  spaces\n\n\ttab",
        "汉字 и кириллица 🙂", "<|im_start|>user\nHi<|im_end|>\n", "it's we'll I'd",
    ]  # fmt: skip
    assert ask("llama", {"model": files("int4"), "texts": texts})["ids"] == [tokenizer(t)["input_ids"] for t in texts]


def test_the_chat_template_is_used(files):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = ask("llama", {"model": files("int4"), "chat": [chat], "new_tokens": 12})["replies"]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]
    (tokens,) = ask("llama", {"model": files("int4"), "prompts": [prompt], "new_tokens": 12})["tokens"]
    assert reply
    assert str(tokenizer.decode(tokens)).startswith(reply)
