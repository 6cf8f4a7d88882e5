"""Mistral: windows shorter and longer than prompts, none, and the default of an absent key."""

from typing import Any

from checkpoints import VOCAB, Checks, Variant, rope

CHECKS = {
    "mistral": Checks(
        config={
            "model_type": "mistral",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
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
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "mlp out",
        },
    )
}


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    theta = config.pop("rope_parameters")["rope_theta"]
    return config | {"torch_dtype": config.pop("dtype"), "rope_theta": theta}


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    return {key: value for key, value in config.items() if key not in ("sliding_window", "num_key_value_heads")}


VARIANTS = {
    "mistral": Variant(family="mistral"),
    "mistral_head_dim": Variant(family="mistral", config={"head_dim": 14}, legacy=legacy),
    "mistral_window_of_one": Variant(family="mistral", config={"sliding_window": 1}),
    "mistral_no_window": Variant(family="mistral", config={"sliding_window": None}),
    "mistral_defaults": Variant(
        family="mistral", config={"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 8}, legacy=bare
    ),
}

REFUSED = [
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
]
FAULTS = [
    ('keys.optional("sliding_window", 4096)', 'keys.size("sliding_window", 4096) + 1', "mistral"),
    ('keys.optional("sliding_window", 4096)', "None", "mistral_window_of_one"),
    ('keys.optional("num_key_value_heads", 8)', 'keys.size("num_key_value_heads", 4)', "mistral_defaults"),
    ("scale=c.head_dim**-0.5", "scale=(c.hidden // c.heads) ** -0.5", "mistral_head_dim"),
    ("rms_norm(m, w.mlp_norm, c.eps)", "rms_norm(m, w.attn_norm, c.eps)", "mistral_no_window"),
    ("rotate(q, cos, sin)), tap", "q), tap", "mistral"),
]
