"""OLMo 2: biases, grouped queries, the defaults of absent keys, every rope in fp32."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, head_norms, rope

CHECKS = {
    "olmo2": Checks(
        config={
            "model_type": "olmo2",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_norm out",
            "k": "self_attn.k_norm out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "post_attention_layernorm out",
            "residual_mid": "mlp in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "post_feedforward_layernorm out",
        },
        fused="q_norm|k_norm",
        draw=head_norms,
    )
}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it, without the keys that have a default of their own."""
    scaling = config.pop("rope_parameters")
    assert scaling.pop("rope_theta") == 10000.0
    defaults = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "attention_bias", "hidden_act")
    config = {key: value for key, value in config.items() if key not in defaults}
    return config | {"rope_scaling": scaling if len(scaling) > 1 else None, "torch_dtype": config.pop("dtype")}


VARIANTS = {
    "olmo2": Variant(family="olmo2", shard="60KB"),
    "olmo2_silent": Variant(
        family="olmo2",
        config={"num_key_value_heads": 6, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
        | rope("default", rope_theta=10000.0),
        legacy=silent,
        dtype=torch.bfloat16,
    ),
    "olmo2_biases": Variant(family="olmo2", config={"attention_bias": True, "num_key_value_heads": 1}, head="tied"),
    "olmo2_yarn": Variant(family="olmo2", config=YARN, dtype=torch.float16),
    "olmo2_head_dim": Variant(family="olmo2", config={"head_dim": 14, "hidden_act": "gelu"}, head="other"),
    "olmo2_no_prefix": Variant(family="olmo2", config={"num_key_value_heads": None}, head="tied", prefix=False),
}

FAULTS: list[tuple[str, str, str]] = [
    ('"rms_norm_eps", 1e-5', '"rms_norm_eps", 1e-6', "olmo2_silent"),
    ("rotary(c.rope, batch, torch.float32)", "rotary(c.rope, batch, x.dtype)", "olmo2_silent"),
    (
        "heads(rms_norm_late(linear(x, w.k, w.k_bias), w.k_norm, c.eps), c.head_dim)",
        "rms_norm_late(heads(linear(x, w.k, w.k_bias), c.head_dim), heads(w.k_norm[None], c.head_dim), c.eps)",
        "olmo2",
    ),
    ("w.o_bias), w.attn_norm, c.eps)", "w.o_bias), w.mlp_norm, c.eps)", "olmo2_yarn"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "olmo2_biases"),
    (
        "return rms_norm_late(x, w.weight, c.eps)",
        "return llama.final_norm(x, w, c, batch)",
        "olmo2_yarn",
    ),
    ("ACTIVATIONS[c.act](linear(m, w.gate))", "ACTIVATIONS[c.act](linear(m, w.up))", "olmo2_head_dim"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmo2", {"sliding_window": 7}, "sliding_window"),
    ("olmo2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("olmo2", {"num_key_value_heads": 4}, "num_key_value_heads"),
]
