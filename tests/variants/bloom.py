"""Bloom: numbers of heads that are powers of two and that are not, files and configs of the hub."""

from typing import Any

import torch
from checkpoints import VOCAB, Checks, Variant

CHECKS = {
    "bloom": Checks(
        config={
            "model_type": "bloom",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "n_layer": 3,
            "n_head": 5,
            "layer_norm_epsilon": 1e-3,
            "pad_token_id": 0,
        },
        root="transformer.",
        embedding="word_embeddings.weight",
        layers="transformer.h",
        norm="transformer.ln_f",
        points={
            "z": "self_attention.dense in",
            "attn_out": "self_attention.dense out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.dense_4h_to_h in",
            "mlp_out": "mlp.dense_4h_to_h out",
        },
        positions=False,
    )
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As it lies on the hub: names of Megatron, and much that nobody reads."""
    sizes = {"n_embed": config.pop("hidden_size"), "num_attention_heads": config.pop("n_head"), "n_inner": None}
    fused = {"bias_dropout_fusion": True, "masked_softmax_fusion": True, "attention_softmax_in_fp32": True}
    skip = {"skip_bias_add": True, "skip_bias_add_qkv": False, "offset_alibi": 100, "seq_length": 2048}
    for key in ("layer_norm_epsilon", "tie_word_embeddings"):
        del config[key]
    return config | sizes | fused | skip | {"torch_dtype": config.pop("dtype"), "pretraining_tp": 4, "unk_token_id": 0}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    return {key: value for key, value in config.items() if key not in ("n_head", "n_layer", "hidden_size")}


VARIANTS = {
    "bloom": Variant(family="bloom", head="tied", shard="60KB"),
    "bloom_published": Variant(
        family="bloom",
        config={"n_head": 12, "layer_norm_epsilon": 1e-5},
        head="tied",
        prefix=False,
        legacy=published,
        dtype=torch.float16,
    ),
    "bloom_eight_heads": Variant(
        family="bloom", config={"n_head": 8, "n_layer": 2, "hidden_size": 64}, head="tied", legacy=silent
    ),
    "bloom_one_head": Variant(family="bloom", config={"n_head": 1, "hidden_size": 36}, head="other"),
    "bloom_untied": Variant(family="bloom", config={"n_head": 6, "tie_word_embeddings": False}, dtype=torch.bfloat16),
    "bloom_head_alone": Variant(family="bloom", config={"n_head": 15}, head="alone"),
}

FAULTS: list[tuple[str, str, str]] = [
    ("w.norm, w.norm_bias, c.eps", "w.norm, w.norm_bias, 1e-5", "bloom"),
    ("w.tokens), w.norm, w.norm_bias", "w.tokens), w.norm, None", "bloom_untied"),
    ("q, k, v = torch.split", "k, q, v = torch.split", "bloom"),
    ("heads(a, 3 * width), width, dim=-1", "heads(a, width), c.heads, dim=1", "bloom_eight_heads"),
    ("slopes = alibi_slopes(c.heads, batch)", "slopes = 1.01 * alibi_slopes(c.heads, batch)", "bloom_one_head"),
    ("torch.baddbmm(bias, queries,", "torch.baddbmm(0 * bias, queries,", "bloom_published"),
    ("keys.transpose(1, 2), alpha=scale)", "keys.transpose(1, 2))", "bloom_untied"),
    ("0.79788456 * x * (1 + 0.044715 * x * x)", "0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))", "bloom"),
    ('keys.size("n_head", 8)', 'keys.size("n_head", 4)', "bloom_eight_heads"),
    ('"layer_norm_epsilon", 1e-5', '"layer_norm_epsilon", 1e-6', "bloom_published"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bloom", {"n_head": 7}, "n_head"),
    ("bloom", {"slow_but_exact": True}, "slow_but_exact"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("bloom", {"n_inner": 100}, "n_inner"),
    ("bloom", {"alibi": False}, "alibi"),
]
