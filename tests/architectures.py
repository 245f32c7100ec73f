"""Configs of tiny models of many architectures, by name; `tests.tiny` makes the models.

Each is as small as its architecture allows: two blocks (three where the kinds of blocks take turns), 64 wide.
"""

from __future__ import annotations

from typing import Any

_TOKENS: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_C: dict[str, Any] = {**_TOKENS, "initializer_range": 0.2}
_D: dict[str, Any] = {
    **_C, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_GPT2: dict[str, Any] = {**_C, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NEOX: dict[str, Any] = {
    **_C, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_FALCON: dict[str, Any] = {**_C, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT: dict[str, Any] = {
    **_C, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_GEMMA: dict[str, Any] = {**_D, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
_LOCAL: dict[str, Any] = {**_D, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE: dict[str, Any] = {**_D, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DEEPSEEK: dict[str, Any] = {
    **_D, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"]

#: By name: transformers' model type, and what its config says.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa_bias": ("llama", {**_D, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral_sw": ("mistral", {**_D, "sliding_window": 16, "head_dim": 16}),
    "qwen2": ("qwen2", {**_D, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_D, "head_dim": 32}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _D),
    "phi": ("phi", {**_D, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NEOX),
    "falcon": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon_alibi": ("falcon", {**_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {**_C, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 64}),
    "opt350": ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            **_C,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
            "window_size": 16,
        },
    ),
    "mpt": ("mpt", {"vocab_size": 260, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "stablelm": ("stablelm", _D),
    "olmo2": ("olmo2", _D),
    "cohere": ("cohere", {**_D, "logit_scale": 0.0625}),
    "granite": (
        "granite",
        {
            **_D,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
        },
    ),
    "mixtral": ("mixtral", _LOCAL),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 64}),
    "granitemoe": ("granitemoe", _LOCAL),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_LOCAL,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "shared_intermediate_size": 64,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_D,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 32,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": ("mamba", {**_TOKENS, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 32}),
    "mamba2": (
        "mamba2",
        {
            **_TOKENS,
            "hidden_size": 64,
            "state_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "expand": 2,
        },
    ),
    "gpt_oss": ("gpt_oss", {**_LOCAL, "head_dim": 16, "sliding_window": 16, "layer_types": _KINDS}),
    "phimoe": ("phimoe", _LOCAL),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 260,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            **_D,
            "intermediate_size_mlp": 128,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_D, "num_hidden_layers": 3, "head_dim": 16, "lru_width": 64, "attention_window_size": 32},
    ),
    "rwkv": (
        "rwkv",
        {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 128, "intermediate_size": 128},
    ),
    "lfm2": ("lfm2", {**_D, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_TOKENS,
            "vocab_size_per_layer_input": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "hidden_size_per_layer_input": 16,
            "sliding_window": 16,
            "layer_types": _KINDS,
            "num_kv_shared_layers": 0,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 8, "n_ctx": 128}),
    "biogpt": (
        "biogpt",
        {
            **_C,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 128,
        },
    ),
    "xglm": (
        "xglm",
        {**_C, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "max_position_embeddings": 128},
    ),
    "persimmon": ("persimmon", _D),
    # and some that no list of faults names
    "gemma": ("gemma", {**_D, "head_dim": 16}),
    "starcoder2": ("starcoder2", _D),
    "smollm3": ("smollm3", _D),
    "glm4": ("glm4", {**_D, "head_dim": 16, "partial_rotary_factor": 0.5}),
    "cohere2": ("cohere2", {**_D, "logit_scale": 0.0625, "sliding_window": 16, "layer_types": _KINDS}),
    "nemotron": ("nemotron", {**_D, "head_dim": 16}),
    "olmoe": ("olmoe", {**_D, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 16}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "jetmoe": (
        "jetmoe",
        {
            **_C,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 128,
        },
    ),
    "ernie4_5": ("ernie4_5", {**_D, "head_dim": 16}),
    "helium": ("helium", {**_D, "head_dim": 16}),
    "exaone4": ("exaone4", {**_D, "sliding_window": 16, "layer_types": _KINDS}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
}


def config_of(name: str) -> Any:
    """The config of an architecture of this list, or of `gemma3_vision`, a text model in a wrapper with a tower."""
    from transformers import AutoConfig, Gemma3Config

    if name != "gemma3_vision":
        kind, options = ARCHITECTURES[name]
        return AutoConfig.for_model(kind, **options)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return Gemma3Config(
        text_config=dict(ARCHITECTURES["gemma3_text"][1]), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=259, boi_token_index=257, eoi_token_index=258,
    )  # fmt: skip


def save_checkpoint(name: str, directory: Any) -> None:
    """Save a random model of an architecture with the names that the hub's files have; no bias is zero."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if name == "gemma3_vision" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config_of(name))
        with torch.no_grad():  # zeros would hide that a bias was lost, and a gain of one that a norm was
            for key, value in model.named_parameters():
                if key.endswith("bias"):
                    value.add_(torch.randn_like(value) * 0.5)
                elif value.ndim == 1:
                    value.add_(torch.rand_like(value) * 0.5)
    model.save_pretrained(directory)
