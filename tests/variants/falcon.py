"""Falcon: the 7b's single key, the 40b's groups, the 11b's one norm, the rw models with alibi, in parallel and not."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CONFIG = {
    "model_type": "falcon",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "layer_norm_epsilon": 1e-3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    **rope("default"),
}
FALCON = Checks(
    config=CONFIG,
    root="transformer.",
    embedding="word_embeddings.weight",
    layers="transformer.h",
    norm="transformer.ln_f",
    points={
        "z": "self_attention.dense in",
        "attn_out": "self_attention out",
        "mlp_hidden": "mlp.dense_4h_to_h in",
        "mlp_out": "mlp out",
    },
    sums="x + (m + a)",
)
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
RW = {"parallel_attn": False, "multi_query": False, "bias": True}
ALIBI = RW | {"alibi": True, "rope_parameters": None}

CHECKS = {
    "falcon": FALCON,
    "falcon_40b": replace(FALCON, config=CONFIG | NEW),
    "falcon_rw": replace(
        FALCON,
        config=CONFIG | RW,
        points={**FALCON.points, "residual_mid": "post_attention_layernorm in"},
        sums="mid + m",
    ),
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it, without the keys that have a default of their own."""
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "ffn_hidden_size")}
    theta = {"rope_theta": config["rope_parameters"]["rope_theta"]}
    old = {"apply_residual_connection_post_layernorm": False, "n_embed": kept.pop("hidden_size")}
    return kept | theta | old | {"torch_dtype": kept.pop("dtype"), "num_ln_in_parallel_attn": None}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys whose default a 7b means."""
    meant = "alibi bias multi_query new_decoder_architecture parallel_attn num_kv_heads num_attention_heads"
    meant += " ffn_hidden_size layer_norm_epsilon rope_parameters activation max_position_embeddings"
    return {key: value for key, value in config.items() if key not in meant.split()}


VARIANTS = {
    "falcon": Variant(family="falcon", head="tied", shard="60KB"),
    "falcon_silent": Variant(
        family="falcon",
        config={"num_attention_heads": 71, "hidden_size": 142, "layer_norm_epsilon": 1e-5, "num_hidden_layers": 2}
        | rope("default", rope_theta=10000.0),
        head="other",
        legacy=silent,
    ),
    "falcon_biases": Variant(
        family="falcon", config={"bias": True, "ffn_hidden_size": 101}, prefix=False, head="tied", dtype=torch.bfloat16
    ),
    "falcon_dynamic": Variant(
        family="falcon",
        config=rope("dynamic", factor=2.0) | {"max_position_embeddings": LONGEST - 8, "multi_query": False},
        head="tied",
    ),
    "falcon_40b": Variant(family="falcon_40b", head="other", legacy=published, dtype=torch.bfloat16),
    "falcon_11b": Variant(
        family="falcon_40b",
        config={"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "ffn_hidden_size": 101},
        shard="60KB",
    ),
    "falcon_rw": Variant(
        family="falcon_rw", config=ALIBI, head="tied", attention=("sdpa",), legacy=published, dtype=torch.bfloat16
    ),
    "falcon_rw_twelve_heads": Variant(
        family="falcon_rw",
        config=ALIBI | {"num_attention_heads": 12, "hidden_size": 72, "bias": False},
        head="tied",
        attention=("sdpa",),
    ),
    "falcon_sequential": Variant(family="falcon_rw", config={"multi_query": True}, head="tied"),
    "falcon_alibi_parallel": Variant(
        family="falcon_40b", config={"alibi": True}, head="tied", attention=("sdpa",), dtype=torch.float16
    ),
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", {"num_attention_heads": 7}, "num_attention_heads"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("falcon_40b", {"parallel_attn": False}, "parallel_attn"),
    ("falcon_40b", {"num_kv_heads": 4}, "num_kv_heads"),
    ("falcon_40b", {"num_kv_heads": 1}, "num_kv_heads"),
    ("falcon_rw", {"num_kv_heads": 2}, "num_kv_heads"),
    ("falcon", {"n_head": 6}, "n_head"),
    ("falcon_rw", {"alibi": True, "num_attention_heads": 4}, "odd"),
]

FAULTS: list[tuple[str, str, str]] = [
    ("qkv[:, :, each]), tap(", "qkv[:, :, each + 1]), tap(", "falcon"),
    (
        "view(-1, c.kv_heads, each + 2, c.head_dim)",
        "view(-1, each + 2, c.kv_heads, c.head_dim).transpose(1, 2)",
        "falcon_40b",
    ),
    ("m = layer_norm(x, w.mlp_norm", "m = layer_norm(x, w.attn_norm", "falcon_40b"),
    ('"num_ln_in_parallel_attn", 2 if grouped else 1', '"num_ln_in_parallel_attn", 1', "falcon_40b"),
    ("x + (feed(m, w, c, batch, tap) + a)", "(x + a) + feed(m, w, c, batch, tap)", "falcon_11b"),
    ("x = batch.linear(x, weight)", "return batch.linear(x, weight, bias)", "falcon_biases"),
    ("alibi_slopes(c.heads, batch).bfloat16()", "alibi_slopes(c.heads, batch)", "falcon_rw_twelve_heads"),
    ("(added / math.sqrt(q.shape[-1]))", "added", "falcon_rw_twelve_heads"),
    ("attn_mask=mask)", "attn_mask=mask, enable_gqa=True)", "falcon_silent"),
    ('"layer_norm_epsilon", 1e-5', '"layer_norm_epsilon", 1e-6', "falcon_silent"),
    ("F.softmax(scores + mask, dim=-1, dtype=q.dtype)", "F.softmax(scores * mask.exp(), dim=-1)", "falcon_sequential"),
    ("if not c.alibi:\n        cos", "if True:\n        cos", "falcon_alibi_parallel"),
]
