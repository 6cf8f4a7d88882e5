"""Qwen 3 with experts: renormalised scores and plain ones, dense layers between, the two names of the count."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, head_norms, rope

CHECKS = {
    "qwen3_moe": Checks(
        config={
            "model_type": "qwen3_moe",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 104,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 22,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_norm out",
            "k": "self_attn.k_norm out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "router_logits": "mlp.gate out [0]",
            "expert_ids": "mlp.gate out [2]",
            "mlp_out": "mlp out",
        },
        fused="q_norm|k_norm",
        draw=head_norms,
    )
}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    own |= {"num_experts": config.pop("num_local_experts"), "max_window_layers": 1, "sliding_window": 9}
    coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    return config | own | coder


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    experts = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    others = ("num_key_value_heads", "head_dim", "mlp_only_layers", "decoder_sparse_step")
    return {key: value for key, value in config.items() if key not in (*experts, *others)}


VARIANTS = {
    "qwen3_moe": Variant(family="qwen3_moe", shard="60KB"),
    "qwen3_moe_published": Variant(
        family="qwen3_moe",
        config=YARN | {"num_experts": 16, "num_experts_per_tok": 8},
        legacy=published,
        dtype=torch.bfloat16,
    ),
    "qwen3_moe_silent": Variant(
        family="qwen3_moe",
        config={"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}
        | {"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 1, "moe_intermediate_size": 768}
        | {"norm_topk_prob": False},
        legacy=silent,
        dtype=torch.bfloat16,
    ),
    "qwen3_moe_plain": Variant(
        family="qwen3_moe",
        config={"norm_topk_prob": False, "attention_bias": True, "num_experts_per_tok": 1},
        head="tied",
        prefix=False,
    ),
    "qwen3_moe_dense_layers": Variant(
        family="qwen3_moe",
        config={"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 4, "attention_bias": True},
        dtype=torch.float16,
    ),
    "qwen3_moe_window": Variant(
        family="qwen3_moe",
        config={"use_sliding_window": True, "mlp_only_layers": [0], "num_key_value_heads": 1},
        head="other",
    ),
    "qwen3_moe_two_counts": Variant(
        family="qwen3_moe", config={"num_experts": 8}, legacy=lambda config: config | {"num_experts": 6}
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ('keys.size("num_local_experts", keys.size("num_experts", 128))', 'keys.size("num_experts", 128)', "qwen3_moe"),
    (
        'keys.size("num_local_experts", keys.size("num_experts", 128))',
        'keys.size("num_experts", keys.size("num_local_experts", 128))',
        "qwen3_moe_two_counts",
    ),
    ('"num_experts_per_tok", 8', '"num_experts_per_tok", 4', "qwen3_moe_silent"),
    ('"num_key_value_heads", 4', '"num_key_value_heads", 32', "qwen3_moe_silent"),
    ("windows(keys, lambda layer: True)", "windows(keys, lambda layer: layer > 0)", "qwen3_moe_window"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "qwen3_moe_plain"),
    ("w.q_norm, c.eps", "w.k_norm, c.eps", "qwen3_moe"),
    ("scale=c.head_dim**-0.5", "scale=(c.hidden // c.heads) ** -0.5", "qwen3_moe_dense_layers"),
    ("Layer if c.sparse[layer] else", "Layer if not c.sparse[layer] else", "qwen3_moe_dense_layers"),
    ("mixture(rms_norm(x, w.mlp_norm, c.eps)", "mixture(rms_norm(x, w.attn_norm, c.eps)", "qwen3_moe_published"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}, "max_window_layers"),
    ("qwen3_moe", {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, "layer_types"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
]
