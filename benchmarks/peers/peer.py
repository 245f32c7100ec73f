"""One run of a peer: model in memory, `llmcompressor.oneshot`, the judge. Runs in the peers' environment.

Called by the contest with one JSON argument (see `contest.Job`); the answer goes to the file that it names.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.judge import broken_fours, judge, zeros_by_layer

#: A plain "lm_head" does not match, and tied embeddings would be pruned with it.
IGNORE = ["re:.*lm_head"]


def recipe(job: dict[str, Any]) -> list[Any]:
    """The modifiers of a job: pruning, then rounding."""
    structure = "2:4" if job["task"].startswith("2of4") else "0:0"
    steps: list[Any] = []
    if job["method"].startswith("sparsegpt"):
        steps.append(SparseGPTModifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=IGNORE))
    elif job["method"] == "wanda":
        steps.append(WandaPruningModifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=IGNORE))
    if job["method"].endswith("gptq"):
        options = {} if job["actorder"] is None else {"actorder": job["actorder"]}
        steps.append(GPTQModifier(config_groups=_int4(job["observer"]), ignore=IGNORE, **options))
    elif job["method"] == "nearest" and job["task"] == "int4":
        steps.append(QuantizationModifier(config_groups=_int4(job["observer"]), ignore=IGNORE))
    elif job["method"] == "nearest":
        steps.append(QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORE))
    return steps


def _int4(observer: str) -> dict[str, Any]:
    """Weights in 4 bits, symmetric, a scale for 64 columns: 576 columns do not divide by 128."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
        "observer": observer,
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def main() -> None:
    """Compress under the clock, then judge."""
    job = json.loads(sys.argv[1])
    tensors = load_file(job["inputs"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    samples = tensors["calibration"][: job["samples"]].tolist()
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]})
    begun = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe(job),
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]),
        shuffle_calibration_samples=False,
        pipeline="datafree" if job["method"] == "nearest" else "sequential",
        propagate_error=job["propagate_error"],
    )
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = judge(model, tensors["evaluation"], tensors["dense_hidden"], tensors["head"])
    found |= {"seconds": seconds, "peak_rss_bytes": peak}
    if job["task"] == "2of4":
        found["broken_fours"] = broken_fours(model)
    Path(job["answer"]).write_text(json.dumps(found | {"zeros": zeros_by_layer(model)}))


if __name__ == "__main__":
    main()
