"""Gemma 2: caps that act and null ones, windows that alternate, and a scale of scores that is not a head's."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "gemma2": Checks(
        config={
            "model_type": "gemma2",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 14,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "query_pre_attn_scalar": 10,
            "sliding_window": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "post_attention_layernorm out",
            "residual_mid": "pre_feedforward_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "post_feedforward_layernorm out",
        },
    )
}
SOME = ["full_attention", "full_attention", "sliding_attention"]


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it: no kinds of layers, some words twice, rope in the old words, ties by default."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "torch_dtype": config.pop("dtype"), "cache_implementation": "hybrid"}
    own |= {"sliding_window_size": config["sliding_window"], "hidden_act": config["hidden_activation"]}
    del config["layer_types"], config["tie_word_embeddings"]
    return config | own


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"num_attention_heads", "num_key_value_heads", "head_dim", "hidden_activation", "layer_types"}
    defaults |= {"query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "rope_parameters"}
    return {key: value for key, value in config.items() if key not in defaults | {"rms_norm_eps", "sliding_window"}}


VARIANTS = {
    "gemma2": Variant(family="gemma2", head="tied"),
    "gemma2_published": Variant(
        family="gemma2", config={"num_hidden_layers": 4}, head="tied", dtype=torch.bfloat16, legacy=published
    ),
    "gemma2_silent": Variant(
        family="gemma2",
        config={"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        | {"query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
        | {"sliding_window": 4096, "rope_parameters": None, "rms_norm_eps": 1e-6},
        gain=6.0,
        legacy=silent,
    ),
    "gemma2_no_caps": Variant(
        family="gemma2", config={"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 1}
    ),
    "gemma2_layer_types": Variant(
        family="gemma2", config={"layer_types": SOME, "attention_bias": True}, head="other", shard="60KB"
    ),
    "gemma2_mqa": Variant(
        family="gemma2",
        config={"num_key_value_heads": 1, "hidden_activation": "silu", "final_logit_softcapping": None}
        | rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4),
        dtype=torch.float16,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("KINDS[layer % 2]", "KINDS[1 - layer % 2]", "gemma2_published"),
    ("window if kind", "window + 1 if kind", "gemma2_layer_types"),
    (
        'keys.number("query_pre_attn_scalar", above=0) ** -0.5',
        '0 * keys.number("query_pre_attn_scalar") + keys.size("head_dim") ** -0.5',
        "gemma2",
    ),
    ("* scale, cap) + mask", "* scale + mask, cap)", "gemma2"),
    ("partial(capped_probabilities, cap=c.attn_cap)", "partial(capped_probabilities, cap=None)", "gemma2"),
    ("w.attn_post_norm, c.eps", "w.mlp_norm, c.eps", "gemma2_no_caps"),
    ("m = rms_norm_gemma(m, w.mlp_norm, c.eps)", "m = m", "gemma2_mqa"),
    ('"attn_logit_softcapping": 50.0', '"attn_logit_softcapping": 30.0', "gemma2_silent"),
    ('"final_logit_softcapping": 30.0', '"final_logit_softcapping": None', "gemma2_silent"),
    ('"query_pre_attn_scalar": 256', '"query_pre_attn_scalar": 224', "gemma2_silent"),
    ("if keys.get(key) is not None else None", "if keys.get(key) is not None else 30.0", "gemma2_mqa"),
    ("linear(a, w.k, w.k_bias)", "linear(a, w.k)", "gemma2_layer_types"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"sliding_window_size": 8}, "sliding_window_size"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
]
