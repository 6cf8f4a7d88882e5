"""Llama 4: chunks shorter than prompts, layers without rope, with and without temperature, dense and sparse."""

import dataclasses
from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "llama4": Checks(
        config={
            "model_type": "llama4_text",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 7,
            "floor_scale": 5,
            "attn_scale": 0.3,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "feed_forward.down_proj in",
            "router_logits": "feed_forward.router out [1]",
            "mlp_out": "feed_forward out",
        },
    )
}
CHECKS["llama4_sparse"] = dataclasses.replace(
    CHECKS["llama4"],
    config=CHECKS["llama4"].config | {"interleave_moe_layer_step": 1},
    points={hook: point for hook, point in CHECKS["llama4"].points.items() if hook != "mlp_hidden"},
)
LLAMA3 = {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0}
LENGTHS = {"original_max_position_embeddings": LONGEST - 4}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "attn_scale", "use_qk_norm"}
    derived = {"layer_types", "no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step"}
    return {key: value for key, value in config.items() if key not in defaults | derived}


VARIANTS = {
    "llama4": Variant(family="llama4", shard="60KB"),
    "llama4_two_chosen": Variant(
        family="llama4", config={"num_experts_per_tok": 2, "attention_bias": True}, head="tied"
    ),
    "llama4_all_sparse": Variant(family="llama4_sparse"),
    "llama4_bare_heads": Variant(
        family="llama4",
        config={"use_qk_norm": False, "attn_temperature_tuning": False, "num_local_experts": 20}
        | rope("llama3", **LLAMA3, **LENGTHS),
        dtype=torch.bfloat16,
    ),
    "llama4_layer_lists": Variant(
        family="llama4",
        config={"no_rope_layers": [0, 1, 1, 0], "moe_layers": [1], "attention_chunk_size": LONGEST}
        | {"layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"]},
    ),
    "llama4_silent": Variant(
        family="llama4_sparse",
        config={"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": None}
        | {"rms_norm_eps": 1e-5, "attn_scale": 0.1, "no_rope_layer_interval": 4},
        legacy=silent,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("product(up * ACTIVATIONS[c.act](gate)", "product(gate * ACTIVATIONS[c.act](up)", "llama4"),
    ("m[rows] * scores[rows, index, None]", "m[rows]", "llama4"),
    ("sums.to(x.dtype)", "0 * sums.to(x.dtype)", "llama4"),
    ("(positions + 1.0)", "positions", "llama4"),
    ("else None) for kind", "else chunk) for kind", "llama4"),
    ("c.attn_scale + 1.0", "c.attn_scale", "llama4"),
    ("(c.head_dim,), eps=c.eps", "(c.head_dim,), eps=1e-6", "llama4"),
    ("if c.ropes[layer] else (tempered(q, c, batch), k)", "", "llama4"),
    ("if not c.normed:", "if c.normed:", "llama4_bare_heads"),
    ("if not c.tempered:", "if c.tempered:", "llama4_bare_heads"),
    ('"chunked_attention" if ropes[layer]', '"chunked_attention" if not ropes[layer]', "llama4_silent"),
    ("layer in sparse for", "layer + 1 in sparse for", "llama4_layer_lists"),
    ('"no_rope_layer_interval", 4', '"no_rope_layer_interval", 2', "llama4_silent"),
    ("500000.0", "10000.0", "llama4_silent"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama4", {"attention_chunk_size": None}, "attention_chunk_size"),
    ("llama4", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
    ("llama4", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("llama4", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
    ("llama4", {"attn_temperature_tuning": 4}, "attn_temperature_tuning"),
]
