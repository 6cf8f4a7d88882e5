"""Qwen 2 with experts: which layers have them, renormalised scores, windows by another rule, old files."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "qwen2_moe": Checks(
        config={
            "model_type": "qwen2_moe",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 104,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "max_window_layers": 2,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "router_logits": "mlp.gate out [0]",
            "expert_ids": "mlp.gate out [2]",
            "mlp_out": "mlp out",
        },
    )
}
SLIDING = {"use_sliding_window": True}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def untyped(config: dict[str, Any]) -> dict[str, Any]:
    """With the layers' kinds left to ``max_window_layers``."""
    return {key: value for key, value in config.items() if key != "layer_types"}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    for key in ("qkv_bias", "mlp_only_layers", "norm_topk_prob", "decoder_sparse_step"):
        del config[key]
    return untyped(config) | own | {"sliding_window": 9}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    return {key: value for key, value in config.items() if key not in (*sizes, "num_key_value_heads")}


VARIANTS = {
    "qwen2_moe": Variant(family="qwen2_moe", shard="60KB"),
    "qwen2_moe_published": Variant(family="qwen2_moe", config=YARN, legacy=published, dtype=torch.bfloat16),
    "qwen2_moe_renormalised": Variant(
        family="qwen2_moe",
        config={"norm_topk_prob": True, "qkv_bias": False, "num_experts_per_tok": 4},
        gain=2.0,
        head="tied",
        prefix=False,
    ),
    "qwen2_moe_dense_layers": Variant(
        family="qwen2_moe",
        config={"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 4},
        dtype=torch.float16,
    ),
    "qwen2_moe_window": Variant(
        family="qwen2_moe",
        config=SLIDING | {"num_hidden_layers": 4, "mlp_only_layers": [0], "max_window_layers": 3},
        legacy=untyped,
    ),
    "qwen2_moe_layer_types": Variant(
        family="qwen2_moe",
        config=SLIDING | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        head="other",
    ),
    "qwen2_moe_silent": Variant(
        family="qwen2_moe",
        config={"hidden_size": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4}
        | {"num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 1, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632},
        legacy=silent,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("(layer + 1) % step == 0", "layer % step == 0", "qwen2_moe_dense_layers"),
    ("layer not in dense and", "", "qwen2_moe_dense_layers"),
    ("layer % 2 == 0 and layer < end", "layer >= end", "qwen2_moe_window"),
    ('"norm_topk_prob", False', '"norm_topk_prob", True', "qwen2_moe_published"),
    ("if c.renormalised:", "if not c.renormalised:", "qwen2_moe_renormalised"),
    ("return score * linear(", "return linear(", "qwen2_moe"),
    ("gate, up = F", "up, gate = F", "qwen2_moe_layer_types"),
    ("scores.to(m.dtype), experts", "scores, experts", "qwen2_moe_published"),
    ("rms_norm(x, w.mlp_norm, c.eps)", "rms_norm(x, w.mlp_norm, 1e-6)", "qwen2_moe"),
    ('keys.size("num_experts_per_tok", 4)', 'keys.size("num_experts_per_tok", 8)', "qwen2_moe_silent"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ("qwen2_moe", {"n_shared_experts": 2}, "n_shared_experts"),
    ("qwen2_moe", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("qwen2_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
]
