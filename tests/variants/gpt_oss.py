"""gpt-oss: sinks, windows, clamps that act, the rope of a silent config, biases and what old files call things."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "gpt_oss": Checks(
        config={
            "model_type": "gpt_oss",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "swiglu_limit": 1.5,
            "swiglu_alpha": 1.3,
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
            "router_logits": "mlp.router out [0]",
            "expert_ids": "mlp.router out [2]",
            "mlp_out": "mlp out",
        },
    )
}
YARN = {"factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0, "beta_slow": 0.3}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"head_dim", "layer_types", "swiglu_alpha", "attention_bias", "num_key_value_heads", "rms_norm_eps"}
    return {key: value for key, value in config.items() if key not in defaults | {"rope_parameters"}}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it."""
    scaling = config.pop("rope_parameters")
    theta, chosen = scaling.pop("rope_theta"), config["num_experts_per_tok"]
    own = {"rope_scaling": scaling, "rope_theta": theta, "initial_context_length": 4096, "experts_per_token": chosen}
    return config | own | {"num_experts": config.pop("num_local_experts")}


VARIANTS = {
    "gpt_oss": Variant(family="gpt_oss", shard="60KB"),
    "gpt_oss_silent": Variant(
        family="gpt_oss",
        config={"rope_parameters": None, "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"swiglu_alpha": 1.702, "rms_norm_eps": 1e-5},
        legacy=silent,
        dtype=torch.bfloat16,
    ),
    "gpt_oss_published": Variant(
        family="gpt_oss",
        config=rope("yarn", **YARN, truncate=False) | {"num_local_experts": 16, "num_experts_per_tok": 1},
        legacy=published,
    ),
    "gpt_oss_layer_types": Variant(
        family="gpt_oss",
        config={"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]} | {"sliding_window": 1},
        head="tied",
    ),
    "gpt_oss_no_bias": Variant(
        family="gpt_oss",
        config={"attention_bias": False, "num_key_value_heads": 8, "head_dim": 64, "num_attention_heads": 8},
    ),
    "gpt_oss_no_window": Variant(family="gpt_oss", config={"layer_types": ["full_attention"] * 3}, dtype=torch.float16),
}

FAULTS: list[tuple[str, str, str]] = [
    ("gate_up[:, ::2]", "gate_up[:, : c.mlp_width]", "gpt_oss"),
    ("(up + 1)", "up", "gpt_oss"),
    (".clamp(-c.limit, c.limit)", ".clamp(max=c.limit)", "gpt_oss"),
    ("F.softmax(best, dim=-1)", "F.softmax(logits, dim=-1).gather(1, ids)", "gpt_oss"),
    ("linear(m, w.router, w.router_bias)", "linear(m, w.router)", "gpt_oss"),
    ("dim=-1)[..., :-1]", "dim=-1)[..., 1:]", "gpt_oss"),
    ("(scores, sinks[:, None, None]", "(scores, torch.zeros_like(sinks)[:, None, None]", "gpt_oss"),
    ("if layer % 2", "if layer % 2 == 0", "gpt_oss_silent"),
    ("150000.0", "10000.0", "gpt_oss_silent"),
    ('"truncate": False', '"truncate": True', "gpt_oss_silent"),
    ('"rms_norm_eps", 1e-5', '"rms_norm_eps", 1e-6', "gpt_oss_silent"),
    ('keys.optional("num_key_value_heads", 8)', 'keys.optional("num_key_value_heads", 16)', "gpt_oss_silent"),
    ('kind == "sliding_attention"', 'kind != "sliding_attention"', "gpt_oss_layer_types"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
    ("gpt_oss", {"experts_per_token": 2}, "experts_per_token"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "spread": 1}}, "spread"),
]
