"""vLLM's side of the engine checks: `python vllm_runner.py request.json answer.json`.

Runs in vLLM's own environment, which has another transformers, and therefore imports nothing of the project. The
request and the answer are told in `benchmarks.engines`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: an error arrives here, with its text
        "VLLM_NO_USAGE_STATS": "1",
    }
)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model and do what is asked; an error that the engine raises is the answer, too."""
    from vllm import LLM, SamplingParams

    if "codes" in request:
        return {"wrong": [wrong_products(largest) for largest in request["codes"]]}
    try:
        engine = LLM(
            model=request["model"],
            dtype=request.get("dtype", "float32"),
            max_model_len=1024,
            enforce_eager=not request.get("compiled", False),
            **request.get("options", {}),
            enable_prefix_caching=False,
            seed=0,
        )
    except Exception as error:  # noqa: BLE001 (the engine's message is what is asked for)
        return {"error": f"{type(error).__name__}: {error}"}

    def run(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        options = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    try:
        answer: dict[str, Any] = {}
        if "prompts" in request:
            answer["tokens"] = run(request["prompts"], request["new_tokens"])
        if "samples" in request:
            answer |= {
                "nll": sum(nll(engine, ids) for ids in request["samples"]),
                "predictions": sum(len(ids) - 1 for ids in request["samples"]),
            }
        if "runs" in request:
            answer["seconds"] = [seconds(run, *given, repeats=request["repeats"]) for given in request["runs"]]
        if "batches" in request:
            answer["speed"] = [
                measure(run, batch, request["prompt_tokens"], request["new_tokens"]) for batch in request["batches"]
            ]
    except Exception as error:  # noqa: BLE001 (a kernel that is not there shows itself only here)
        return {"error": f"{type(error).__name__}: {error}"}
    return answer


def wrong_products(largest: int) -> float:
    """The share of products of INT8 inputs with INT8 weights up to ``largest`` that are not what integers give."""
    import torch
    from vllm import _custom_ops as ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (16, 576), dtype=torch.int8, generator=generator)
    weight = torch.randint(-largest, largest + 1, (192, 576), dtype=torch.int8, generator=generator)
    scale, found = torch.ones(192, 1), torch.empty(16, 192)  # the handler keeps the scale's address, not the scale
    handler = ops.create_onednn_scaled_mm(weight.t(), scale, torch.float32, True, False, 8)
    ops.onednn_scaled_mm(handler, x, found, torch.ones(16, 1), None, None, None)
    exact = x.double() @ weight.double().t()  # whole numbers below 2^53
    return float(((found.double() - exact).abs() > 0.5).double().mean())


def nll(engine: Any, ids: list[int]) -> float:
    """Σ −log p of every token but the first, nats."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (output,) = engine.generate([{"prompt_token_ids": ids}], options, use_tqdm=False)
    found = output.prompt_logprobs[1:]  # there is none for the first token
    return -sum(entry[token].logprob for entry, token in zip(found, ids[1:], strict=True))


def seconds(run: Any, batch: int, prompt_tokens: int, new_tokens: int, *, repeats: int) -> list[float]:
    """What `batch` prompts and so many new tokens after each take, every time; once more beforehand, uncounted."""
    prompts, found = prompts_of(batch, prompt_tokens), []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run(prompts, new_tokens)
        found.append(time.perf_counter() - begun)
    return found[1:]


def prompts_of(batch: int, tokens: int) -> list[list[int]]:
    """Prompts of so many tokens, each another."""
    return [[(7 * i + 13 * j) % 1000 + 100 for i in range(tokens)] for j in range(batch)]


def measure(run: Any, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Tokens a second: prefill from a run of one new token, decode from what more of them take beyond it."""
    prompts = prompts_of(batch, prompt_tokens)
    run(prompts, 2)
    first: list[float] = []
    longer: list[float] = []
    for _ in range(2):
        for times, count in ((first, 1), (longer, 1 + new_tokens)):
            begun = time.perf_counter()
            run(prompts, count)
            times.append(time.perf_counter() - begun)
    prefill, decode = min(first), min(longer) - min(first)
    return {"batch": batch, "prefill": batch * prompt_tokens / prefill, "decode": batch * new_tokens / decode}


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
