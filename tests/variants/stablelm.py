"""StableLM: sequential and parallel branches, a norm for every head, the defaults of absent keys."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Variant, rope
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "stablelm",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
    **rope("default", partial_rotary_factor=0.4),
}
POINTS = {
    "v": "self_attn.v_proj out",
    "z": "self_attn.o_proj in",
    "attn_out": "self_attn out",
    "mlp_hidden": "mlp.down_proj in",
    "mlp_out": "mlp out",
}
PLAIN = {"q": "self_attn.q_proj out", "k": "self_attn.k_proj out"}
NORMED = {"qk_layernorm": True}


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """The size of scores is that of the weights of the heads' norms."""
    return 1 + 0.3 * values if ".norms." in name else None


SEQUENTIAL = Checks(config=CONFIG, points=POINTS | PLAIN | {"residual_mid": "post_attention_layernorm in"}, draw=draw)
PARALLEL = replace(
    SEQUENTIAL, config=CONFIG | {"use_parallel_residual": True}, points=POINTS, fused=r"\.norms\.", sums="x + a + m"
)
CHECKS = {
    "stablelm": SEQUENTIAL,
    "stablelm_normed": replace(
        PARALLEL,
        config=CONFIG | NORMED,
        points=POINTS | {"residual_mid": "post_attention_layernorm in"},
        sums="mid + m",
    ),
    "stablelm_parallel": PARALLEL,
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    old = {"rope_theta": scaling.pop("rope_theta"), "partial_rotary_factor": scaling.pop("partial_rotary_factor")}
    kind = scaling.pop("rope_type")
    old |= {"rope_scaling": {"type": kind, **scaling} if kind != "default" else None}
    return config | old | {"torch_dtype": config.pop("dtype"), "hidden_dropout": 0.0, "attention_dropout": 0.0}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("rope_parameters", "hidden_act", "layer_norm_eps", "num_key_value_heads", "num_attention_heads")
    flags = ("use_qkv_bias", "qk_layernorm", "use_parallel_residual", "tie_word_embeddings", "max_position_embeddings")
    return {key: value for key, value in config.items() if key not in (*meant, *flags)}


VARIANTS = {
    "stablelm": Variant(family="stablelm", shard="60KB"),
    "stablelm_published": Variant(
        family="stablelm",
        config={"use_qkv_bias": True} | rope("linear", factor=2.5, partial_rotary_factor=0.4),
        legacy=published,
        dtype=torch.float16,
    ),
    "stablelm_silent": Variant(
        family="stablelm",
        config={"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 1}
        | {"layer_norm_eps": 1e-5, "rope_parameters": None},
        legacy=silent,
    ),
    "stablelm_normed": Variant(family="stablelm_normed", head="tied", prefix=False, dtype=torch.bfloat16),
    "stablelm_12b": Variant(family="stablelm_parallel", config=NORMED, legacy=published, shard="60KB"),
    "stablelm_parallel": Variant(
        family="stablelm_parallel",
        config={"use_qkv_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu"}
        | rope("dynamic", factor=2.0, partial_rotary_factor=1.0),
        head="other",
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("w.attn_norm_bias, c.eps", "w.attn_norm_bias, 1e-5", "stablelm"),
    ('"layer_norm_eps", 1e-5', '"layer_norm_eps", 1e-6', "stablelm_silent"),
    ("partial=0.25", "partial=0.5", "stablelm_silent"),
    ('"num_key_value_heads": 32', '"num_key_value_heads": 8', "stablelm_silent"),
    ("norm_per_head(k, w.k_norm, c.eps)", "norm_per_head(k, w.q_norm[: len(w.k_norm)], c.eps)", "stablelm_12b"),
    ("range(count))", "reversed(range(count)))", "stablelm_normed"),
    ("scale, None, eps)", "scale, None, 1e-6)", "stablelm_12b"),
    ("if c.sequential:", "if c.parallel:", "stablelm_parallel"),
    ("x = x + attend(n,", "x = x + attend(x,", "stablelm"),
    ("linear(n, w.v, w.v_bias)", "linear(n, w.v)", "stablelm_published"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stablelm", {"num_attention_heads": 7}, "num_attention_heads"),
    ("stablelm", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("stablelm", {"hidden_act": "tanh"}, "hidden_act"),
    ("stablelm", {"head_dim": 12}, "head_dim"),
    ("stablelm", {"attention_bias": True}, "attention_bias"),
]
