"""Granite MoE: one expert and several of many, multipliers, biases, and a silent config."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "granitemoe": Checks(
        config={
            "model_type": "granitemoe",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.37,
            "residual_multiplier": 0.61,
            "logits_scaling": 3.3,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "residual_mid": "post_attention_layernorm in",
            "router_logits": "block_sparse_moe.router out [0]",
            "expert_ids": "block_sparse_moe.router out [2]",
        },
    )
}
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    return config | own | {"output_router_logits": False, "router_aux_loss_coef": 0.01}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"num_key_value_heads", "rms_norm_eps", "attention_bias", "rope_parameters", "tie_word_embeddings"}
    defaults |= {"num_local_experts", "num_experts_per_tok", *MULTIPLIERS}
    return {key: value for key, value in config.items() if key not in defaults}


VARIANTS = {
    "granitemoe": Variant(family="granitemoe"),
    "granitemoe_published": Variant(
        family="granitemoe",
        config={"embedding_multiplier": 12, "num_local_experts": 16, "num_experts_per_tok": 4},
        head="tied",
        dtype=torch.bfloat16,
        legacy=published,
        shard="60KB",
    ),
    "granitemoe_silent": Variant(
        family="granitemoe",
        config=dict.fromkeys(MULTIPLIERS, 1.0)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}
        | {"rms_norm_eps": 1e-6, "rope_parameters": None},
        gain=1.0,
        legacy=silent,
    ),
    "granitemoe_one": Variant(
        family="granitemoe",
        config={"num_experts_per_tok": 1, "attention_bias": True, "hidden_act": "swish"}
        | rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4),
        head="other",
        prefix=False,
        dtype=torch.float16,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("F.softmax(best, dim=-1)", "F.softmax(logits, dim=-1).gather(1, ids)", "granitemoe"),
    ("gate, up = F.linear", "up, gate = F.linear", "granitemoe"),
    ("w.experts, batch, expert).mul_(c.residual_multiplier)", "w.experts, batch, expert)", "granitemoe"),
    ("scale=c.attention_multiplier", "scale=c.head_dim**-0.5", "granitemoe"),
    ('keys.size("num_experts_per_tok", 2)', 'keys.size("num_experts_per_tok", 1)', "granitemoe_silent"),
    ('keys.size("num_local_experts", 8)', 'keys.size("num_local_experts", 16)', "granitemoe_silent"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "granitemoe_one"),
    ("m = rms_norm(x, w.mlp_norm, c.eps)", "m = rms_norm(x, w.attn_norm, c.eps)", "granitemoe_published"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("granitemoe", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
    ("granitemoe", {"num_local_experts": 0}, "num_local_experts"),
    ("granitemoe", {"mlp_bias": True}, "mlp_bias"),
    ("granitemoe", {"hidden_act": "gelu"}, "hidden_act"),
]
