"""Command R and R+: norms of queries and keys, scales of logits, wider heads, the defaults of absent keys."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Variant, head_norms, rope

CONFIG: dict[str, Any] = {
    "model_type": "cohere",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "logit_scale": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 6,
    **rope("default"),
}
POINTS = {
    "q": "self_attn.q_proj out",
    "k": "self_attn.k_proj out",
    "v": "self_attn.v_proj out",
    "z": "self_attn.o_proj in",
    "attn_out": "self_attn out",
    "mlp_hidden": "mlp.down_proj in",
    "mlp_out": "mlp out",
}


COHERE = Checks(config=CONFIG, points=POINTS, sums="x + a + m", draw=head_norms)
CHECKS = {
    "cohere": COHERE,
    "cohere_plus": replace(
        COHERE,
        config=CONFIG | {"use_qk_norm": True},
        points=POINTS | {"q": "self_attn.q_norm out", "k": "self_attn.k_norm out"},
        fused="[qk]_norm",
    ),
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "model_max_length": 131072}
    del config["tie_word_embeddings"]
    return config | own | {"rope_scaling": scaling}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("rope_parameters", "hidden_act", "layer_norm_eps", "num_key_value_heads", "num_attention_heads")
    flags = ("use_qk_norm", "attention_bias", "logit_scale", "tie_word_embeddings", "max_position_embeddings")
    return {key: value for key, value in config.items() if key not in (*meant, *flags)}


VARIANTS = {
    "cohere": Variant(family="cohere", shard="60KB"),
    "cohere_published": Variant(
        family="cohere", config=rope("linear", factor=2.5), head="tied", legacy=published, dtype=torch.float16
    ),
    "cohere_silent": Variant(
        family="cohere",
        config={"hidden_size": 256, "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 1}
        | {
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        gain=2.0,
        head="tied",
        legacy=silent,
    ),
    "cohere_plus": Variant(family="cohere_plus", legacy=published, head="tied", shard="60KB", dtype=torch.bfloat16),
    "cohere_plus_biases": Variant(
        family="cohere_plus",
        config={"attention_bias": True, "num_key_value_heads": None, "hidden_act": "gelu"}
        | rope("dynamic", factor=2.0),
        prefix=False,
        head="other",
    ),
    "cohere_head_dim": Variant(
        family="cohere", config={"head_dim": 18, "num_key_value_heads": 1} | rope("yarn", factor=4.0), head="alone"
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("x + a + m)", "x + (a + m))", "cohere"),
    ("* c.logit_scale", "* 0.0625", "cohere_published"),
    ('"logit_scale", 0.0625', '"logit_scale", 1.0', "cohere_silent"),
    ('max_position_embeddings"), 500000.0', 'max_position_embeddings"), 10000.0', "cohere_silent"),
    ('"layer_norm_eps", 1e-5', '"layer_norm_eps", 1e-6', "cohere_silent"),
    ('    "tie_word_embeddings": True,\n', "", "cohere_published"),
    ("norm(k, w.k_norm, c.eps)", "norm(k, w.k_norm, 1e-5)", "cohere_plus"),
    ("part.float(), cos, sin", "part.float(), cos, -cos", "cohere_plus"),
    ("centred.pow(2)", "exact.pow(2)", "cohere"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "cohere_plus_biases"),
    ("exact - exact.mean(-1, keepdim=True)", "exact", "cohere_head_dim"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("cohere", {"num_attention_heads": 7}, "num_attention_heads"),
    ("cohere", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("cohere", {"hidden_act": "tanh"}, "hidden_act"),
    ("cohere", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("cohere", {"sliding_window": 7}, "sliding_window"),
]
