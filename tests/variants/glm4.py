"""GLM-4: shares of a head that rope turns and where they are written, biases on and off, old files."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "glm4": Checks(
        config={
            "model_type": "glm4",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            "eos_token_id": 2,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "post_self_attn_layernorm out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "post_mlp_layernorm out",
        },
    )
}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "partial_rotary_factor": scaling["partial_rotary_factor"]}
    return config | own | {"torch_dtype": config.pop("dtype"), "rope_scaling": None}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    own = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "attention_bias")
    return {key: value for key, value in config.items() if key not in own}


VARIANTS = {
    "glm4": Variant(family="glm4", shard="60KB"),
    "glm4_published": Variant(
        family="glm4",
        config={"attention_bias": False} | rope("default", partial_rotary_factor=1 / 3),
        legacy=published,
        dtype=torch.bfloat16,
    ),
    "glm4_whole_heads": Variant(
        family="glm4",
        config={"num_key_value_heads": 1} | rope("default", partial_rotary_factor=1.0),
        head="tied",
        prefix=False,
    ),
    "glm4_yarn": Variant(
        family="glm4", config=YARN | {"hidden_act": "gelu"}, dtype=torch.float16, gain=2.0, head="other"
    ),
    "glm4_silent": Variant(
        family="glm4",
        config={"head_dim": 128, "num_attention_heads": 4, "rms_norm_eps": 1.5625e-7, "rope_parameters": None},
        legacy=silent,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("partial=0.5", "partial=1.0", "glm4_silent"),
    ('keys.flag("attention_bias", True)', 'keys.flag("attention_bias", False)', "glm4_silent"),
    ('keys.size("num_key_value_heads", 2)', 'keys.size("num_key_value_heads", 4)', "glm4_silent"),
    ('keys.size("head_dim", 128)', 'keys.size("head_dim", 15)', "glm4_silent"),
    ("w.mlp_norm, c.eps", "w.attn_post_norm, c.eps", "glm4"),
    ("w.mlp_post_norm, c.eps", "w.mlp_norm, c.eps", "glm4_yarn"),
    ("gate, up = linear", "up, gate = linear", "glm4_published"),
    ("rotate_pairs(k, cos, sin)", "rotate_pairs(k, sin, cos)", "glm4_whole_heads"),
    ("linear(a, w.v, w.v_bias)", "linear(a, w.v)", "glm4"),
    ("rms_norm(x, w.attn_norm, c.eps)", "rms_norm(x, w.attn_norm, 1e-6)", "glm4"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("glm4", {"sliding_window": 7}, "sliding_window"),
    ("glm4", {"mlp_bias": True}, "mlp_bias"),
    ("glm4", rope("mrope"), "mrope"),
    ("glm4", {"attention_bias": 1}, "attention_bias"),
    ("glm4", {"hidden_act": "quick_gelu"}, "hidden_act"),
]
