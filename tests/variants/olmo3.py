"""OLMo 3: which layers slide, two ropes in the words of three generations of files, the defaults of absent keys."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, head_norms


def ropes(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0}

CHECKS = {
    "olmo3": Checks(
        config={
            "model_type": "olmo3",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-2,
            "sliding_window": 7,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **ropes(plain(500.0), plain(50.0)),
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


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    full = config.pop("rope_parameters")["full_attention"]
    own = {"rope_theta": full.pop("rope_theta"), "rope_scaling": full if len(full) > 1 else None}
    return config | own | {"torch_dtype": config.pop("dtype")}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = ("rope_parameters", "layer_types", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    return {key: value for key, value in config.items() if key not in (*defaults, "attention_bias", "hidden_act")}


VARIANTS = {
    "olmo3": Variant(family="olmo3", shard="60KB", legacy=lambda config: config | {"layer_types": None}),
    "olmo3_published": Variant(
        family="olmo3",
        config=ropes(YARN | {"rope_theta": 500000.0}, plain(500000.0)) | {"num_key_value_heads": 6},
        legacy=published,
        dtype=torch.bfloat16,
    ),
    "olmo3_silent": Variant(
        family="olmo3",
        config=ropes(plain(500000.0), plain(500000.0)) | {"num_key_value_heads": 6, "rms_norm_eps": 1e-5},
        legacy=silent,
        dtype=torch.float16,
    ),
    "olmo3_layer_types": Variant(
        family="olmo3",
        config={"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3}
        | ropes(YARN | {"rope_theta": 100.0}, plain(50.0)),
    ),
    "olmo3_biases": Variant(family="olmo3", config={"attention_bias": True, "sliding_window": 1}, head="tied"),
    "olmo3_theta_of_full": Variant(
        family="olmo3",
        config=ropes({"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0}, {"rope_type": "default"}),
        legacy=lambda config: config | {"rope_parameters": config["rope_parameters"] | {"sliding_attention": None}},
        head="other",
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("if layer % 4 == 3 else", "if layer % 4 == 0 else", "olmo3"),
    ("THETA = 500000.0", "THETA = 10000.0", "olmo3_silent"),
    ("rotary(c.ropes[layer]", "rotary(c.rope", "olmo3_published"),
    ("return Rope.read(full, keys,", "return Rope.read(sliding, keys,", "olmo3_layer_types"),
    ("sees=c.sees[layer]", "sees=c.sees[0]", "olmo3_layer_types"),
    ("rotary(c.ropes[layer], batch, torch.float32)", "rotary(c.ropes[layer], batch, x.dtype)", "olmo3_silent"),
    ("linear(m, w.down), w.mlp_norm, c.eps", "linear(m, w.down), w.attn_norm, c.eps", "olmo3_biases"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
    ("olmo3", {"rope_parameters": None, "rope_theta": 1000.0}, "rope_theta"),
    ("olmo3", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ("olmo3", {"sliding_window": None}, "sliding_window"),
    ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
]
