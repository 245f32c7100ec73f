"""Tiny random models, tokenizers and texts for tests: made from configs, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

VOCABULARY = 260
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    *("the", "a", "river", "stone", "walks", "under", "bright", "cold", "engine", "slowly", "seven", "maps"),
    *("of", "and", "weight", "grain", "letter", "moon"),
)


def tiny_tokenizer(directory: Path, *, starts_with_bos: bool = False) -> Path:
    """Save a byte-level tokenizer (a token a byte, three special ones, a chat template) to `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    if starts_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return directory


def tiny_config(**changes: Any) -> Any:
    """A Llama config: 2 blocks, hidden 32, feed-forward 64, 4 heads, 2 key/value heads, tied embeddings."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def tiny_model(config: Any = None, *, seed: int = 0) -> Any:
    """A random causal LM of a config (default `tiny_config()`), float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config or tiny_config()).eval()


def tiny_checkpoint(
    directory: Path,
    config: Any = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    starts_with_bos: bool = False,
    max_shard_size: str = "1GB",
) -> Path:
    """Save a tiny random model and its tokenizer as a Hugging Face checkpoint with safetensors."""
    model = tiny_model(config, seed=seed).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer(directory, starts_with_bos=starts_with_bos)
    return directory


def tiny_documents(count: int = 6, words: int = 200, *, seed: int = 0) -> pd.DataFrame:
    """A corpus table: columns `id`, `title`, `text`; `count` documents of `words` random words."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS, size=words)) for _ in range(count)]
    titles = [f"Document {row}" for row in range(count)]
    return pd.DataFrame({"id": range(count), "title": titles, "text": texts})


def tiny_tokens(samples: int = 4, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, shape (samples, length), int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (samples, length), generator=generator)
