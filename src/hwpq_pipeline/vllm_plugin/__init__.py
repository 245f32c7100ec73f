"""A vLLM plugin: `vllm serve` on a packed 2:4 export (`checkpoints.packed`), with nothing of vLLM patched.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. From then on it knows the
quantization method `hwpq`, which the export's `config.json` names. vLLM wants other versions of transformers and numba
than this project, so the project is installed beside it without its dependencies (docs/engines.md), and this room
imports nothing but torch, numpy, numba, safetensors, vLLM itself, and vLLM's transformers for the shapes of a model.

    config    reads the section of `config.json`, and says which method a layer has
    linear    packed layers, fused ones (q, k and v; gate and up) and shards of tensor parallelism included
    tables    embedding and head in codes
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method known; once more does no harm.

    It raises nothing: vLLM would then start for no model at all. What is wrong is said when a model of ours is opened.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from hwpq_pipeline.checkpoints.packed_form import METHOD
    from hwpq_pipeline.vllm_plugin.config import HwpqConfig

    register_quantization_config(METHOD)(HwpqConfig)
