"""vLLM (CPU) loads the exports of `make run` and generates what transformers generates from them.

Both run in float32. Their sums are in another order, so two tokens whose logits are as good as equal may change places;
from there on the texts differ although both are right. A token of vLLM's must therefore be transformers' own choice
at that place, given vLLM's tokens before it, or miss it by less than `TIE`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.engines import ask
from tests.engines.conftest import NEW_TOKENS, greedy, load, missed

VARIANTS = ("dense", "fp8", "int4", "int8", "2of4-fp8", "2of4-int4")
#: Logits apart. The logits of these models spread over some 30; rounding activations to FP8 makes jumps of hundredths.
TIE = 0.05
#: What vLLM says where its build for a processor has no kernel for a scheme; `docs/engines.md` has it too.
NO_KERNEL = {"int4": "'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"}


def lacks_kernel(variant: str) -> str | None:
    """The message to expect on this processor, if its build has no kernel for the variant's scheme."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return None
    return next((message for grid, message in NO_KERNEL.items() if variant.endswith(grid)), None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(variant, prompts, variants, root):
    export = variants(variant).export
    answer = ask("vllm", {"model": export, "prompts": prompts, "new_tokens": NEW_TOKENS})
    if message := lacks_kernel(variant):
        assert message in answer["error"], answer
        assert message in (root / "docs" / "engines.md").read_text(encoding="utf-8")
        return
    assert "tokens" in answer, answer
    model = load(export)
    for prompt, theirs, mine in zip(prompts, answer["tokens"], greedy(model, prompts), strict=True):
        assert len(theirs) == NEW_TOKENS
        behind = missed(model, prompt, theirs)
        print(f"vllm {variant}: same tokens {theirs == mine}, missed by {float(behind.max()):.4f}")  # noqa: T201
        assert float(behind.max()) < TIE, (theirs, mine, behind)
