"""Continued prompts, against a greedy loop over the whole sequence each time."""

from __future__ import annotations

import pytest
import torch

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.evaluation.continuations import continue_prompts
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_the_likeliest_token_each_time(checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["the river", "a stone"]
    found = continue_prompts(checkpoint, prompts, new_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for prompt, entry in zip(prompts, found, strict=True):
        ids = start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.inference_mode():
                following = model(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
            if following == tokenizer.eos_token_id:
                break
        wanted = tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)
        assert entry == {"prompt": prompt, "continuation": wanted}


def test_no_prompt_is_no_text_and_an_empty_one_is_refused(checkpoint):
    assert continue_prompts(checkpoint, [], new_tokens=4) == []
    with pytest.raises(HwpqError, match="no token"):
        continue_prompts(checkpoint, ["", "a"], new_tokens=4)
