"""Gemma 3: two ropes in the words of every version, patterns of windows, and configs that omit most of their keys."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant
from torch import Tensor

FULL, LOCAL = "full_attention", "sliding_attention"


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """Norms scale by 1 + weight; those of queries and keys alone say how far attention is from uniform."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.4 + 0.3 * values
    return 0.3 * values if name.endswith("norm.weight") else None


def ropes(full: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 5000.0, **full},
            LOCAL: {"rope_type": "default", "rope_theta": 100.0, **local},
        }
    }


CHECKS = {
    "gemma3": Checks(
        config={
            "model_type": "gemma3_text",
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
            "layer_types": [LOCAL, FULL, LOCAL],
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            **ropes({}, {}),
        },
        points={
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "post_attention_layernorm out",
            "residual_mid": "pre_feedforward_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "post_feedforward_layernorm out",
        },
        draw=draw,
    )
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_slow": 0.3}
SIX = {"num_hidden_layers": 6, "layer_types": None, "hidden_size": 48, "intermediate_size": 64}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: the pattern as a number, a scaled rope and a local one, ties by default."""
    both = config.pop("rope_parameters")
    own = {"rope_theta": both[FULL].pop("rope_theta"), "rope_local_base_freq": both[LOCAL]["rope_theta"]}
    own |= {"rope_scaling": both[FULL], "sliding_window_pattern": 2, "torch_dtype": config.pop("dtype")}
    del config["layer_types"], config["tie_word_embeddings"], config["_sliding_window_pattern"]
    return config | own | {"cache_implementation": "hybrid", "attn_logit_softcapping": None}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal file, which has its sizes and little else."""
    own = ("hidden_size", "intermediate_size", "num_hidden_layers", "model_type", "sliding_window", "vocab_size")
    scaling = config["rope_parameters"][FULL]
    return {key: config[key] for key in own} | {"rope_scaling": {"rope_type": "linear", "factor": scaling["factor"]}}


def partly(config: dict[str, Any]) -> dict[str, Any]:
    """With one rope left to its default."""
    del config["rope_parameters"][LOCAL]
    return config


VARIANTS = {
    "gemma3": Variant(family="gemma3", head="tied"),
    "gemma3_published": Variant(
        family="gemma3",
        config=ropes({"rope_type": "linear", "factor": 8.0}, {})
        | {"num_hidden_layers": 4, "layer_types": [LOCAL, FULL, LOCAL, FULL]},
        head="tied",
        dtype=torch.bfloat16,
        legacy=published,
    ),
    "gemma3_silent": Variant(
        family="gemma3",
        config=SIX
        | ropes({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_theta": 1e4})
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
        | {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
        head="tied",
        legacy=silent,
    ),
    "gemma3_window": Variant(
        family="gemma3",
        config=ropes({}, {"rope_theta": 1e4}) | {"sliding_window": 5, "attention_bias": True},
        head="other",
        shard="60KB",
        legacy=partly,
    ),
    "gemma3_scaled": Variant(
        family="gemma3",
        config=ropes(YARN, {"rope_type": "linear", "factor": 2.0})
        | {"num_key_value_heads": 1, "final_logit_softcapping": 5.0},
        dtype=torch.float16,
    ),
    "gemma3_full": Variant(
        family="gemma3",
        config={"layer_types": [FULL] * 3, "hidden_activation": "silu", "num_key_value_heads": 6},
        head="alone",
        prefix=False,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("(layer + 1) % pattern == 0", "layer % pattern == 0", "gemma3_published"),
    ('keys.size("sliding_window_pattern", 6)', 'keys.size("sliding_window_pattern", 3)', "gemma3_silent"),
    ("rotary(c.ropes[layer], batch", "rotary(c.rope, batch", "gemma3"),
    ("(local if kind", "(full if kind", "gemma3_scaled"),
    (
        "heads(linear(a, w.k, w.k_bias), c.head_dim), w.k_norm",
        "heads(linear(a, w.k, w.k_bias), c.head_dim), w.q_norm",
        "gemma3",
    ),
    ('keys.number("rope_local_base_freq", 1e4)', 'keys.number("rope_local_base_freq", 1e6)', "gemma3_window"),
    ('keys.number("rope_theta", 1e6)', 'keys.number("rope_theta", 1e4)', "gemma3_silent"),
    ("window if kind", "window + 1 if kind", "gemma3_window"),
    ("w.mlp_post_norm, c.eps", "w.attn_post_norm, c.eps", "gemma3_full"),
    ('"query_pre_attn_scalar": 256', '"query_pre_attn_scalar": 168', "gemma3_silent"),
    ('"num_attention_heads": 8', '"num_attention_heads": 16', "gemma3_silent"),
    ("scale=c.scale", "scale=c.head_dim**-0.5", "gemma3"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"sliding_window": None}, "sliding_window"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
    ("gemma3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type"),
    ("gemma3", {"layer_types": None, "_sliding_window_pattern": 3}, "_sliding_window_pattern"),
]
