"""Qwen 2: windows that are used and not, in the layers that the config names in one of two ways; YaRN; old files."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "qwen2": Checks(
        config={
            "model_type": "qwen2",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "sliding_window": 7,
            "max_window_layers": 1,
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
SLIDING = {"use_sliding_window": True}
SOME = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: a window that is not used, no kinds of layers, the old words for rope."""
    scaling = config.pop("rope_parameters")
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    own = {"rope_theta": theta, "rope_scaling": {"type": kind, **scaling} if scaling else None}
    own |= {"sliding_window": 9, "use_mrope": False, "torch_dtype": config.pop("dtype")}
    del config["layer_types"], config["tie_word_embeddings"]
    return config | own


def untyped(config: dict[str, Any]) -> dict[str, Any]:
    """With the layers' kinds left to ``max_window_layers``."""
    return {key: value for key, value in config.items() if key != "layer_types"}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    del config["rope_parameters"]["original_max_position_embeddings"]
    defaults = ("num_key_value_heads", "max_position_embeddings", "max_window_layers", "layer_types", "hidden_act")
    return {key: value for key, value in config.items() if key not in defaults}


VARIANTS = {
    "qwen2": Variant(family="qwen2"),
    "qwen2_window": Variant(family="qwen2", config=SLIDING, shard="60KB", legacy=untyped),
    "qwen2_window_everywhere": Variant(
        family="qwen2",
        config=SLIDING | {"max_window_layers": 0, "sliding_window": 1},
        legacy=untyped,
        dtype=torch.float16,
    ),
    "qwen2_layer_types": Variant(family="qwen2", config=SLIDING | {"layer_types": SOME}),
    "qwen2_null_window": Variant(
        family="qwen2", config=SLIDING | {"sliding_window": None, "num_key_value_heads": None}, head="other"
    ),
    "qwen2_published": Variant(family="qwen2", config=YARN, legacy=published, dtype=torch.bfloat16),
    "qwen2_tied": Variant(family="qwen2", config={"num_key_value_heads": 1}, head="tied", prefix=False),
    "qwen2_silent": Variant(
        family="qwen2",
        config={"hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"max_position_embeddings": 32768, **rope("yarn", factor=2.0, beta_slow=1000)},
        legacy=silent,
    ),
    "qwen2_head_dim": Variant(family="qwen2", config=SLIDING | {"head_dim": 14, "hidden_act": "gelu"}),
}

FAULTS: list[tuple[str, str, str]] = [
    ("layer >= last_full", "layer > last_full", "qwen2_window"),
    ('keys.number("max_window_layers", 28)', 'keys.number("max_window_layers", 28) or 28', "qwen2_window_everywhere"),
    ('"full_attention": Sees()', '"full_attention": Sees(window=window)', "qwen2_layer_types"),
    ("if keys.flag(", "if not keys.flag(", "qwen2_published"),
    ("linear(a, w.v, w.v_bias)", "linear(a, w.v)", "qwen2_tied"),
    ("rotate(q, cos, sin)), tap", "rotate(q, cos, -sin)), tap", "qwen2_published"),
    ("ACTIVATIONS[c.act](linear(m, w.gate))", "ACTIVATIONS[c.act](linear(m, w.up))", "qwen2_head_dim"),
    ('keys.optional("num_key_value_heads", 32)', 'keys.optional("num_key_value_heads", 8)', "qwen2_silent"),
    ('"max_position_embeddings", 32768', '"max_position_embeddings", 2048', "qwen2_silent"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"layer_types": SOME}, "use_sliding_window"),
    ("qwen2", SLIDING | {"layer_types": SOME[:2]}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 1]}}, "mrope"),
]
