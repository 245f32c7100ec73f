"""One run of a peer: model in memory, `llmcompressor.oneshot` or AutoRound, the judge. Runs in the peers' environment.

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
from auto_round import AutoRound
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.judge import broken_fours, judge, zeros_by_layer
from benchmarks.peers.tasks import BITS, GROUP

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
        steps.append(GPTQModifier(config_groups=_integers(job), ignore=IGNORE, **options))
    elif job["method"] == "nearest" and job["task"] in BITS:
        steps.append(QuantizationModifier(config_groups=_integers(job), ignore=IGNORE))
    elif job["method"] == "nearest":
        steps.append(QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORE))
    return steps


def _integers(job: dict[str, Any]) -> dict[str, Any]:
    """Weights in few bits, symmetric, with a scale for each group of columns."""
    weights = {
        "num_bits": BITS[job["task"]],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "observer": job["observer"],
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


#: What AutoRound's own command line calls its default and its light recipe: steps and learning rate.
AUTOROUND: dict[str, tuple[int, float | None]] = {"autoround": (200, None), "autoround-light": (50, 5e-3)}


def one_shot(model: Any, job: dict[str, Any], calibration: Tensor) -> Any:
    """The model after llm-compressor's `oneshot`."""
    samples = calibration.tolist()
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]})
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
    return model


def auto_round(model: Any, job: dict[str, Any], calibration: Tensor) -> Any:
    """The model after AutoRound, with the batch of 8 samples that its command line takes."""
    steps, rate = AUTOROUND[job["method"]]
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        scheme="W4A16",
        bits=BITS[job["task"]],
        group_size=GROUP,
        sym=True,
        iters=steps,
        lr=rate,
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        batch_size=8,
        dataset=[{"input_ids": batch} for batch in calibration.split(8)],
        device_map="cpu",
    )
    tuned, _ = tuner.quantize()
    return tuned


def main() -> None:
    """Compress under the clock, then judge."""
    job = json.loads(sys.argv[1])
    tensors = load_file(job["inputs"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    calibration = tensors["calibration"][: job["samples"]]
    begun = time.perf_counter()
    model = (auto_round if job["method"] in AUTOROUND else one_shot)(model, job, calibration)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = judge(model, tensors["evaluation"], tensors["dense_hidden"], tensors["head"])
    found |= {"seconds": seconds, "peak_rss_bytes": peak}
    if job["task"] == "2of4":
        found["broken_fours"] = broken_fours(model)
    Path(job["answer"]).write_text(json.dumps(found | {"zeros": zeros_by_layer(model)}))


if __name__ == "__main__":
    main()
