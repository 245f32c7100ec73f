"""llama.cpp's side of the engine checks: `python llama_runner.py request.json answer.json`.

Runs in an environment of its own (llama-cpp-python and numpy), and imports nothing of the project. The request and the
answer are told in `benchmarks.engines`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model and do what is asked."""
    if "batches" in request:
        return {"speed": [measure(request, batch) for batch in request["batches"]]}
    context = max([len(ids) for ids in request.get("samples") or request.get("prompts") or []], default=0)
    try:
        llama = llama_cpp.Llama(
            request["model"],
            n_ctx=max(context + request.get("new_tokens", 0), 512),
            n_threads=os.cpu_count(),
            logits_all="samples" in request,
            verbose=False,
            seed=0,
        )
    except ValueError as error:
        return {"error": str(error)}
    if "texts" in request:
        return {"ids": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]}
    if "samples" in request:
        losses = [nll(llama, ids) for ids in request["samples"]]
        return {"nll": sum(losses), "predictions": sum(len(ids) - 1 for ids in request["samples"])}
    if "chat" in request:
        options = {"temperature": 0.0, "max_tokens": request["new_tokens"], "repeat_penalty": 1.0}
        replies = [llama.create_chat_completion(messages, **options) for messages in request["chat"]]
        return {"replies": [reply["choices"][0]["message"]["content"] for reply in replies]}
    return {"tokens": [greedy(llama, ids, request["new_tokens"]) for ids in request["prompts"]]}


def greedy(llama: Any, ids: list[int], new_tokens: int) -> list[int]:
    """The likeliest next token, again and again; an end token does not end it."""
    llama.reset()
    chosen: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        chosen.append(int(token))
        if len(chosen) == new_tokens:
            break
    return chosen


def nll(llama: Any, ids: list[int]) -> float:
    """Σ −log p of every token but the first, nats."""
    llama.reset()
    llama.eval(ids)
    logits = np.asarray(llama.scores[: len(ids) - 1], dtype=np.float64)
    top = logits.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((normalizer - logits[np.arange(len(ids) - 1), ids[1:]]).sum())


def measure(request: dict[str, Any], sequences: int) -> dict[str, Any]:
    """Tokens a second of one context with so many sequences: their prompts, then a token each at a time."""
    prompt, new = request["prompt_tokens"], request["new_tokens"]
    llama_cpp.llama_log_set(_SILENT, None)
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = sequences * (prompt + new), sequences
    parameters.n_batch = sequences * prompt
    parameters.n_threads = parameters.n_threads_batch = request["threads"]
    context = llama_cpp.llama_init_from_model(model, parameters)
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(2):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begun = time.perf_counter()
        feed(context, [(j, i) for j in range(sequences) for i in range(prompt)], last=prompt - 1)
        middle = time.perf_counter()
        for step in range(new):
            feed(context, [(j, prompt + step) for j in range(sequences)], last=prompt + step)
        ended = time.perf_counter()
        best["prefill"] = max(best["prefill"], sequences * prompt / (middle - begun))
        best["decode"] = max(best["decode"], sequences * new / (ended - middle))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return {"batch": sequences, **best}


def feed(context: Any, places: list[tuple[int, int]], last: int) -> None:
    """One call for tokens at (sequence, position); logits for those at the last position."""
    batch = llama_cpp.llama_batch_init(len(places), 0, 1)
    batch.n_tokens = len(places)
    for index, (sequence, position) in enumerate(places):
        batch.token[index] = (7 * position + 13 * sequence) % 1000 + 100
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = position == last
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_synchronize(context)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode: {status}")


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _SILENT(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Loading says a great deal."""


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
