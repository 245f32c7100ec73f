"""Configs of tiny models whose decoder blocks hold more than linear layers; `tests.tiny` makes the models."""

from __future__ import annotations

from typing import Any

from tests.tiny import VOCABULARY

SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
WIDE: dict[str, Any] = {
    **SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **WIDE, **EXPERTS, num_local_experts=4, layer_types=["sliding_attention", "full_attention"]
    )  # fmt: skip


def mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**{**WIDE, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2)


def gpt_neo() -> Any:
    from transformers import GPTNeoConfig

    return GPTNeoConfig(
        **SIZE, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128, window_size=16,
    )  # fmt: skip


def qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
    )


def mamba() -> Any:
    from transformers import MambaConfig

    return MambaConfig(**SIZE, hidden_size=64, state_size=16, num_hidden_layers=2, time_step_rank=32)


def cohere() -> Any:
    from transformers import CohereConfig

    return CohereConfig(**WIDE, use_qk_norm=True)  # its norms are matrices
