"""Tiny random models of many families, for the tests that go through all of them."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from kvbench.physics import Architecture

#: Random, untied and widely spread weights give tokens that vary, so that equal tokens mean something.
_PLAIN: dict[str, Any] = {
    "vocab_size": 2560,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2, "head_dim": 64}
_GROUPED_BY_DIVISION = _PLAIN | {"num_key_value_heads": 2}
_OLD = {
    "vocab_size": 2560,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GEMMA = _GROUPED | {"sliding_window": 64, "query_pre_attn_scalar": 64}
_LATENT = _PLAIN | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    **_EXPERTS,
}

#: A configuration for each family that the physics module describes.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 64},
    "qwen2": _GROUPED_BY_DIVISION
    | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "qwen3": _GROUPED | {"head_dim": 32},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": _OLD | {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "opt": _PLAIN | {"ffn_dim": 128, "word_embed_proj_dim": 256, "init_std": 0.1},
    "gpt_neox": _PLAIN,
    "phi3": _GROUPED_BY_DIVISION,
    "falcon": _OLD
    | {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": True,
        "new_decoder_architecture": False,
    },
    "bloom": _OLD | {"hidden_size": 256, "n_layer": 2, "n_head": 4},
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _GROUPED | {"num_experts": 4, **_EXPERTS},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "mamba": _OLD
    | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 20, "expand": 2, "conv_kernel": 4},
    "jamba": _GROUPED
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}

#: Settings of known families that change sizes: each with the family it belongs to.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt_neox", {"attention_bias": False, "rotary_pct": 1.0}),
    ("phi3", {"sliding_window": 32}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": True}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("mamba", {"use_bias": True, "use_conv_bias": False}),
    ("mixtral", {"sliding_window": 32}),
    ("gpt2", {"n_inner": 100, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
]


class NoTokenizer:
    """Stands where the tests generate from token ids alone."""

    def token_to_id(self, token: str) -> None:
        """No token has a name."""

    def id_to_token(self, token: int) -> str:
        """Every id is a token."""
        return f"<{token}>"

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """The ids themselves."""
        return " ".join(map(str, tokens))


def build(family: str, config: dict[str, Any] | None = None, **options: Any):
    """A random model of a family on the CPU in float32, as :func:`kvbench.inputs.models.adopt` gives it."""
    import torch
    from kvbench.inputs import models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = AutoConfig.for_model(family, **(config or CONFIGS[family]))
    model = AutoModelForCausalLM.from_config(values, **options)
    return models.adopt(model, NoTokenizer())


def llama(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    vocabulary: int,
    tied: bool,
    positions: int,
) -> Architecture:
    """An architecture of the Llama family by its sizes."""
    return Architecture.from_config(
        {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": positions,
        }
    )


_SMALL = _PLAIN | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_ALTERNATING = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

_SMALL_LATENT = {key: value for key, value in _SMALL.items() if key != "head_dim"} | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}

#: Families that the physics module does not describe, drawn at random from the library's own list
#: (seeds 2025, 2026, 1126, 2611, 2612; those whose smallest model is not small, or holds pictures, were
#: tried by hand).
UNKNOWN: dict[str, dict[str, Any]] = {
    "vaultgemma": _SMALL | _ALTERNATING | {"query_pre_attn_scalar": 16},
    "cohere2_moe": _SMALL | _ALTERNATING,
    "qwen2_moe": _SMALL | {"shared_expert_intermediate_size": 32},
    "rwkv": {
        "vocab_size": 2560,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "attention_hidden_size": 64,
        "intermediate_size": 64,
        "context_length": 512,
    },
    "minimax_m2": _SMALL | {"num_local_experts": 4},
    "xlm": {"vocab_size": 2560, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "doge": _SMALL | {"sliding_window": 16},
    "roberta": _PLAIN | {"hidden_size": 64, "is_decoder": True, "type_vocab_size": 1},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "vocab_size": 2560,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "nemotron": _SMALL,
    # Seed 1126.
    "hunyuan_v1_moe": _SMALL,
    "camembert": _SMALL | {"is_decoder": True, "type_vocab_size": 1},
    "granitemoe": _SMALL | {"num_local_experts": 4},
    "axk2": _SMALL_LATENT,
    "inkling_text": _SMALL | {"sliding_window": 16, "n_routed_experts": 4},
    "hyperclovax": _SMALL,
    "youtu": _SMALL_LATENT,
    "zaya": _SMALL | {"num_experts_per_tok": 1},
    "cohere2": _SMALL | _ALTERNATING,
    "diffllama": _SMALL,
    # Seed 2611.
    "llama4_text": _SMALL
    | {
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "num_experts_per_tok": 1,
    },
    "gemma4_text": _SMALL
    | _ALTERNATING
    | {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 2560,
        "num_kv_shared_layers": 0,
    },
    "qwen3_5_moe_text": _SMALL
    | {
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "nanochat": _SMALL,
    "apertus": _SMALL,
    "aria_text": _SMALL | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "xlm-roberta": _PLAIN | {"hidden_size": 64, "is_decoder": True, "type_vocab_size": 1},
    # Seed 2612.
    "glm": _SMALL,
    "reformer": _OLD
    | {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "attention_head_size": 16,
        "feed_forward_size": 64,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
        "axial_pos_embds": False,
        "is_decoder": True,
        "max_position_embeddings": 512,
    },
    "arcee": _SMALL,
    "granite": _SMALL,
    "flex_olmo": _SMALL,
    "falcon_mamba": _OLD
    | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "expand": 2, "conv_kernel": 4},
    "xmod": _SMALL
    | {
        "is_decoder": True,
        "type_vocab_size": 1,
        "languages": ["en_XX"],
        "default_language": "en_XX",
    },
    "phimoe": _SMALL | {"num_local_experts": 4},
    "mpt": _OLD | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "helium": _SMALL,
}


def library_at_least(*version: int) -> bool:
    """Whether transformers is at least of a version."""
    found = metadata.version("transformers").split(".")[: len(version)]
    return tuple(map(int, found)) >= version
