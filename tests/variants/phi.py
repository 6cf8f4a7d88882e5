"""Phi: shares of a head that are rotated, norms of queries and keys, few kv heads, the defaults of absent keys."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Variant, rope
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "phi",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
    **rope("default", partial_rotary_factor=0.4),
}
POINTS = {
    "q": "self_attn.q_proj out",
    "k": "self_attn.k_proj out",
    "v": "self_attn.v_proj out",
    "z": "self_attn.dense in",
    "attn_out": "self_attn out",
    "mlp_hidden": "mlp.fc2 in",
    "mlp_out": "mlp out",
}
NORMED = {hook: point for hook, point in POINTS.items() if hook not in ("q", "k")}
"""HF's norms of queries and keys show heads before tokens."""
PHI = Checks(config=CONFIG, norm="model.final_layernorm", points=POINTS, sums="a + m + x")


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """The size of scores is that of the weights of the norms."""
    return 1 + 0.3 * values if name.endswith(("q_layernorm.weight", "k_layernorm.weight")) else None


CHECKS = {
    "phi": PHI,
    "phi_qk_norm": replace(
        PHI, config=CONFIG | {"qk_layernorm": True}, points=NORMED, fused="[qk]_layernorm.weight", draw=draw
    ),
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    old = {"rope_theta": scaling.pop("rope_theta"), "partial_rotary_factor": scaling.pop("partial_rotary_factor")}
    kind = scaling.pop("rope_type")
    old |= {"rope_scaling": {"type": kind, **scaling} if kind != "default" else None}
    return config | old | {"torch_dtype": config.pop("dtype"), "embd_pdrop": 0.0, "resid_pdrop": 0.1}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("rope_parameters", "hidden_act", "layer_norm_eps", "num_key_value_heads", "qk_layernorm")
    return {key: value for key, value in config.items() if key not in (*meant, "tie_word_embeddings")}


VARIANTS = {
    "phi": Variant(family="phi", shard="60KB"),
    "phi_published": Variant(
        family="phi",
        config={"num_key_value_heads": 2} | rope("linear", factor=2.5, partial_rotary_factor=0.4),
        legacy=published,
        dtype=torch.float16,
    ),
    "phi_silent": Variant(
        family="phi", config={"hidden_size": 96, "layer_norm_eps": 1e-5, "rope_parameters": None}, legacy=silent
    ),
    "phi_qk_norm": Variant(family="phi_qk_norm", gain=2.0, legacy=published),
    "phi_qk_norm_grouped": Variant(
        family="phi_qk_norm",
        config={"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}
        | rope("dynamic", factor=2.0, partial_rotary_factor=1.0),
        head="tied",
        prefix=False,
        dtype=torch.bfloat16,
    ),
    "phi_other_head": Variant(family="phi", config={"hidden_act": "gelu", "num_key_value_heads": 3}, head="other"),
}

FAULTS: list[tuple[str, str, str]] = [
    ("a + m + x)", "x + a + m)", "phi"),
    ("linear(x, w.unembed, w.bias)", "linear(x, w.unembed)", "phi_qk_norm_grouped"),
    ("partial=0.5", "partial=0.4", "phi_silent"),
    ('"layer_norm_eps", 1e-5', '"layer_norm_eps", 1e-6', "phi_silent"),
    ('"hidden_act", "gelu_new"', '"hidden_act", "gelu_pytorch_tanh"', "phi_silent"),
    ("w.q_norm_bias, c.eps", "w.q_norm_bias, 1e-5", "phi_qk_norm"),
    ("layer_norm(k, w.k_norm, w.k_norm_bias", "layer_norm(k, w.q_norm, w.k_norm_bias", "phi_qk_norm_grouped"),
    ("linear(n, w.k, w.k_bias)", "linear(n, w.k)", "phi_published"),
    ("mlp(n, batch", "mlp(x, batch", "phi_other_head"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi", {"num_attention_heads": 7}, "num_attention_heads"),
    ("phi", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("phi", {"hidden_act": "tanh"}, "hidden_act"),
    ("phi", {"head_dim": 12}, "head_dim"),
    ("phi", {"sliding_window": 7}, "sliding_window"),
]
