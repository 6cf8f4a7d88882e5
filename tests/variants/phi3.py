"""Phi-3: long rope on both sides of the original context and under its old names, parts of heads, windows."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "phi3": Checks(
        config={
            "model_type": "phi3",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "pad_token_id": 0,
            "eos_token_id": 2,
            **rope("default"),
        },
        points={
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "mlp out",
        },
    )
}
SHORT, LONG = [1.1, 1.5, 2.3, 3.1, 4.7], [2.2, 3.7, 9.1, 17.0, 31.5]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
GROWN = {"original_max_position_embeddings": LONGEST - 12, "sliding_window": None}


def published(kind: str) -> Any:
    def legacy(config: dict[str, Any]) -> dict[str, Any]:
        """As the model's own code wrote it."""
        scaling = config.pop("rope_parameters")
        own = {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "attention_bias": False}
        share = scaling.pop("partial_rotary_factor", 1.0)
        own |= {} if share == 1.0 else {"partial_rotary_factor": share, "full_attn_mod": 1, "lm_head_bias": False}
        factors = {"type": kind, "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
        if kind == "su":  # else transformers cannot load it; the one at the top level counts
            factors["original_max_position_embeddings"] = 64
        return config | own | {"rope_scaling": factors}

    return legacy


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own; the rope's own original context is not read."""
    scaling = {**config["rope_parameters"], "original_max_position_embeddings": LONGEST - 12}
    own = ("original_max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "sliding_window")
    return {key: value for key, value in config.items() if key not in own} | {"rope_parameters": scaling}


VARIANTS = {
    "phi3": Variant(family="phi3", shard="60KB"),
    "phi3_su": Variant(family="phi3", config=GROWN | rope("longrope", **LONGROPE), legacy=published("su")),
    "phi3_yarn": Variant(
        family="phi3",
        config=GROWN | {"num_key_value_heads": 6, "sliding_window": 9} | rope("longrope", **LONGROPE),
        legacy=published("yarn"),
        dtype=torch.bfloat16,
    ),
    "phi3_partial": Variant(
        family="phi3",
        config=GROWN
        | {"num_key_value_heads": 1}
        | rope("longrope", short_factor=SHORT[:3], long_factor=LONG[:3], partial_rotary_factor=0.6),
        legacy=published("longrope"),
        head="tied",
    ),
    "phi3_factors": Variant(
        family="phi3",
        config=GROWN | rope("longrope", **LONGROPE, factor=3.0) | {"hidden_act": "gelu"},
        dtype=torch.float16,
        head="other",
        prefix=False,
    ),
    "phi3_silent": Variant(
        family="phi3",
        config={"num_key_value_heads": 6, "rms_norm_eps": 1e-5, "sliding_window": None}
        | {"original_max_position_embeddings": 4096, "max_position_embeddings": 16384}
        | rope("longrope", **LONGROPE),
        legacy=silent,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ('"original_max_position_embeddings": 4096, **', "**", "phi3_silent"),
    ('"rms_norm_eps", 1e-5', '"rms_norm_eps", 1e-6', "phi3_silent"),
    ('if kind in ("su", "yarn") else scaled', "if False else scaled", "phi3_yarn"),
    ("qkv[:, : c.heads]", "qkv[:, -c.heads :]", "phi3"),
    ("w.mlp_norm, c.eps", "w.attn_norm, c.eps", "phi3"),
    ("gate, up = linear", "up, gate = linear", "phi3_su"),
    (", sees=c.sees", "", "phi3_yarn"),
    ("partial=1.0", "partial=0.5", "phi3_su"),
    ("rotate(k, cos, sin)", "rotate(k, sin, cos)", "phi3_partial"),
    ("rms_norm(x, w.attn_norm, c.eps)", "rms_norm(x, w.attn_norm, 1e-6)", "phi3"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", rope("linear", factor=2.0), "linear"),
    ("phi3", rope("llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0), "llama3"),
    ("phi3", rope("longrope", short_factor=[1.0], long_factor=[1.0]), "short_factor"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
]
