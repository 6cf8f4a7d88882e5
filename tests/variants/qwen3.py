"""Qwen 3: heads wider and narrower than the model's width asks for, biases, windows, the defaults of absent keys."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, head_norms, rope

CHECKS = {
    "qwen3": Checks(
        config={
            "model_type": "qwen3",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 22,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "max_window_layers": 1,
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
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "mlp out",
        },
        fused="q_norm|k_norm",
        draw=head_norms,
    )
}
SLIDING = {"use_sliding_window": True}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    del config["layer_types"]
    return config | own | {"sliding_window": 9}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = ("head_dim", "num_key_value_heads", "layer_types", "attention_bias", "use_sliding_window")
    return {key: value for key, value in config.items() if key not in defaults}


VARIANTS = {
    "qwen3": Variant(family="qwen3", shard="60KB"),
    "qwen3_silent": Variant(
        family="qwen3",
        config={"hidden_size": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
        | {"num_hidden_layers": 1},
        legacy=silent,
    ),
    "qwen3_published": Variant(family="qwen3", config=YARN, legacy=published, dtype=torch.bfloat16, head="tied"),
    "qwen3_biases": Variant(family="qwen3", config={"attention_bias": True, "num_key_value_heads": None}),
    "qwen3_window": Variant(family="qwen3", config=SLIDING | {"num_key_value_heads": 1}, dtype=torch.float16),
    "qwen3_layer_types": Variant(
        family="qwen3",
        config=SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        prefix=False,
        head="tied",
    ),
    "qwen3_head_dim": Variant(
        family="qwen3", config=SLIDING | {"head_dim": 8, "max_window_layers": 2}, legacy=published, head="other"
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ('keys.size("head_dim", 128)', 'keys.size("head_dim", keys.size("hidden_size") // 4)', "qwen3_silent"),
    ("layer >= last_full", "layer > last_full", "qwen3_head_dim"),
    ("w.q_norm, c.eps", "w.k_norm, c.eps", "qwen3"),
    ("w.k_norm, c.eps", "w.k_norm, 1e-6", "qwen3_published"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "qwen3_biases"),
    ('tap("k_rot", rotate(k, cos, sin))', 'tap("k_rot", rms_norm(rotate(k, cos, sin), w.k_norm, c.eps))', "qwen3"),
    ("sees=c.sees[layer]", "sees=c.sees[0]", "qwen3_layer_types"),
    ("scale=c.head_dim**-0.5", "scale=(c.hidden // c.heads) ** -0.5", "qwen3_window"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]
