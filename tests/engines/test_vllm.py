"""vLLM (CPU) loads the exports of `make run`: greedy tokens and perplexity are those of transformers.

Both run in float32, but vLLM in bfloat16 where its kernel takes nothing else (INT4). Their sums are in another order,
so two tokens whose logits are as good as equal may change places; from there on the texts differ although both are
right. A token of vLLM's must therefore be transformers' own choice at that place, given vLLM's tokens before it, or
miss it by less than a tie. Where activations are rounded, sums that differ in their last bits fall on either side of a
rounding's edge, and logits differ by more: what counts as a tie is then measured, as twice what transformers' own two
ways of attention differ by on the same tokens, or its bfloat16 from its float32. Perplexity may then differ by 2 %,
else by 0.1 %.

INT8 is another matter on a processor without VNNI: vLLM's products (oneDNN's) add pairs of 8-bit products in 16 bits
there, which overflow. The test shows that, and holds the variant to generating, and to a perplexity within 15 %.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.engines import ask
from tests.engines.conftest import NEW_TOKENS, chosen_logits, greedy, load, perplexity

VARIANTS = ("dense", "fp8", "int8", "int4", "2of4-fp8", "2of4-int4")
#: Logits apart, where nothing is rounded. The logits of these models spread over some 30.
TIE = 0.05
SAMPLES = 1
#: What vLLM says where its build for a processor has no kernel for a scheme; `docs/engines.md` has it too.
NO_KERNEL = {"int4": "'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"}


def lacks_kernel(variant: str) -> str | None:
    """The message to expect on this processor, if its build has no kernel for the variant's scheme."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return None
    return next((message for grid, message in NO_KERNEL.items() if variant.endswith(grid)), None)


def has_vnni() -> bool:
    """Whether the processor adds 8-bit products in 32 bits."""
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def test_int8_products_are_exact_where_the_processor_adds_them_in_32_bits():
    small, large = ask("vllm", {"codes": [63, 127]})["wrong"]
    print(f"vllm: {large:.1%} of INT8 products are wrong, {small:.1%} with weights up to 63")  # noqa: T201
    assert small == 0
    assert (large == 0) == has_vnni()


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_perplexity_are_those_of_transformers(variant, prompts, samples, variants, root):
    export = variants(variant).export
    message = lacks_kernel(variant)
    halves = variant.endswith("int4") and message is None
    request = {"model": export, "prompts": prompts, "new_tokens": NEW_TOKENS, "samples": samples[:SAMPLES].tolist()}
    answer = ask("vllm", request | {"dtype": "bfloat16" if halves else "float32"})
    if message:
        assert message in answer["error"], answer
        assert message in (root / "docs" / "engines.md").read_text(encoding="utf-8")
        return
    assert "tokens" in answer, answer
    model, overflows = load(export), variant == "int8" and not has_vnni()
    other = load(export, dtype=torch.bfloat16) if halves else model
    ours, theirs = perplexity(model, samples[:SAMPLES]), math.exp(answer["nll"] / answer["predictions"])
    print(f"vllm {variant}: perplexity ours {ours:.4f}, vLLM {theirs:.4f}, {theirs / ours - 1:+.3%}")  # noqa: T201
    mine, behind, jumps = greedy(model, prompts), [], []
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        assert len(tokens) == NEW_TOKENS
        model.set_attn_implementation("sdpa")
        logits = chosen_logits(model, prompt, tokens)
        other.set_attn_implementation("eager")
        jumps.append(float((chosen_logits(other, prompt, tokens) - logits).abs().max()))
        best = logits.max(dim=1).values
        behind.append(float((best - logits[torch.arange(NEW_TOKENS), torch.tensor(tokens)]).max()))
    same = [
        left == right for pair in zip(answer["tokens"], mine, strict=True) for left, right in zip(*pair, strict=True)
    ]
    print(f"vllm {variant}: {sum(same)} of {len(same)} tokens equal, behind {behind}, jumps {jumps}")  # noqa: T201
    exact = variant == "dense"
    assert theirs == pytest.approx(ours, rel=0.001 if exact else 0.02 if not overflows else 0.15)
    if not overflows:
        assert max(behind) < (TIE if exact else max(TIE, 2 * max(jumps))), (answer["tokens"], mine)
