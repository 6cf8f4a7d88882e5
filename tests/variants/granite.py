"""Granite: four multipliers and none, biases, ties, and files as the hub has them."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "granite": Checks(
        config={
            "model_type": "granite",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
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
            "mlp_hidden": "mlp.down_proj in",
        },
    )
}
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    return config | own | {"attention_dropout": 0.1}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"num_key_value_heads", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "rope_parameters"}
    return {key: value for key, value in config.items() if key not in defaults | {*MULTIPLIERS, "tie_word_embeddings"}}


VARIANTS = {
    "granite": Variant(family="granite"),
    "granite_published": Variant(
        family="granite",
        config={"embedding_multiplier": 12, "attention_multiplier": 0.015625, "residual_multiplier": 0.22},
        gain=4.0,
        head="tied",
        dtype=torch.bfloat16,
        legacy=published,
        shard="60KB",
    ),
    "granite_silent": Variant(
        family="granite",
        config=dict.fromkeys(MULTIPLIERS, 1.0)
        | {"num_key_value_heads": 6, "rms_norm_eps": 1e-6, "rope_parameters": None, "max_position_embeddings": 2048},
        gain=1.0,
        legacy=silent,
    ),
    "granite_bias": Variant(
        family="granite",
        config={"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu"},
        head="other",
        prefix=False,
    ),
    "granite_yarn": Variant(
        family="granite",
        config=rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4) | {"head_dim": 14},
        head="alone",
        dtype=torch.float16,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("llama.embed(w, c, batch).mul_(c.embedding_multiplier)", "llama.embed(w, c, batch)", "granite"),
    ("scale=c.attention_multiplier", "scale=c.attention_multiplier * c.head_dim**-0.5", "granite"),
    ("w.o_bias).mul_(c.residual_multiplier)", "w.o_bias)", "granite"),
    ("w.down_bias).mul_(c.residual_multiplier)", "w.down_bias)", "granite"),
    (".div_(c.logits_scaling)", ".mul_(c.logits_scaling)", "granite"),
    ('keys.number("attention_multiplier", 1.0)', 'keys.number("attention_multiplier", 0.125)', "granite_silent"),
    ("linear(m, w.gate, w.gate_bias)", "linear(m, w.gate)", "granite_bias"),
    ("rms_norm(m, w.mlp_norm, c.eps)", "rms_norm(m, w.mlp_norm, 1e-6)", "granite"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("granite", {"residual_multiplier": "large"}, "residual_multiplier"),
    ("granite", {"sliding_window": 8}, "sliding_window"),
    ("granite", {"hidden_act": "mish"}, "hidden_act"),
    ("granite", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
]
