"""GPT-NeoX: parallel and sequential branches, shares of a head that are rotated, files of every age."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Draw, Tensors, Variant, rope

CONFIG: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
    **rope("default", partial_rotary_factor=0.4),
}
POINTS = {
    "z": "attention.dense in",
    "attn_out": "attention out",
    "mlp_hidden": "mlp.dense_4h_to_h in",
    "mlp_out": "mlp out",
}
NEOX = Checks(
    config=CONFIG,
    root="gpt_neox.",
    embedding="embed_in.weight",
    head="embed_out.weight",
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    points=POINTS,
    sums="m + a + x",
)
CHECKS = {
    "gpt_neox": NEOX,
    "gpt_neox_sequential": replace(
        NEOX,
        config=CONFIG | {"use_parallel_residual": False},
        points=POINTS | {"residual_mid": "post_attention_layernorm in"},
        sums="mid + m",
    ),
}


def buffers(config: dict[str, Any], draw: Draw) -> Tensors:
    """What old files hold and nobody reads."""
    side, below = config["max_position_embeddings"], "gpt_neox.layers.{}.attention."
    layers = [below.format(layer) for layer in range(config["num_hidden_layers"])]
    masks = {name + "bias": draw(1, 1, side, side) for name in layers}
    return masks | {name + end: draw(4) for name in layers for end in ("masked_bias", "rotary_emb.inv_freq")}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    scaling = config.pop("rope_parameters")
    old = {"rotary_emb_base": scaling.pop("rope_theta"), "rotary_pct": scaling.pop("partial_rotary_factor")}
    old |= {"rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    return config | old | {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("rope_parameters", "hidden_act", "layer_norm_eps", "use_parallel_residual", "attention_bias")
    return {key: value for key, value in config.items() if key not in (*meant, "tie_word_embeddings")}


VARIANTS = {
    "gpt_neox": Variant(family="gpt_neox", shard="60KB"),
    "gpt_neox_published": Variant(
        family="gpt_neox",
        config={"hidden_act": "gelu_fast"} | rope("linear", factor=2.5, partial_rotary_factor=0.7),
        extra=buffers,
        legacy=published,
        dtype=torch.float16,
    ),
    "gpt_neox_silent": Variant(
        family="gpt_neox", config={"hidden_size": 48, "layer_norm_eps": 1e-5}, gain=2.0, legacy=silent
    ),
    "gpt_neox_sequential": Variant(family="gpt_neox_sequential", legacy=published, shard="60KB", extra=buffers),
    "gpt_neox_no_bias": Variant(
        family="gpt_neox",
        config={"attention_bias": False} | rope("dynamic", factor=2.0, partial_rotary_factor=1.0),
        head="tied",
        prefix=False,
        dtype=torch.bfloat16,
    ),
    "gpt_neox_yarn": Variant(
        family="gpt_neox_sequential",
        config={"hidden_act": "gelu_new", "num_attention_heads": 6}
        | rope("yarn", factor=4.0, partial_rotary_factor=0.6),
        head="other",
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("feed(x, w, c, batch, tap) + a + x)", "x + a + feed(x, w, c, batch, tap))", "gpt_neox"),
    ("(heads three width) ->", "(three heads width) ->", "gpt_neox"),
    ('keys.number("rotary_pct", 0.25)', 'keys.number("rotary_pct", 1.0)', "gpt_neox_silent"),
    ('keys.number("rotary_emb_base", 10000.0)', 'keys.number("rope_theta", 10000.0)', "gpt_neox_published"),
    ('"layer_norm_eps", 1e-5', '"layer_norm_eps", 1e-6', "gpt_neox_silent"),
    ("layer_norm(m, w.mlp_norm, w.mlp_norm_bias", "layer_norm(m, w.attn_norm, w.attn_norm_bias", "gpt_neox_sequential"),
    ("w.o, w.o_bias)", "w.o)", "gpt_neox"),
    ("{**ACTIVATIONS, ", '{"gelu_fast": ACTIVATIONS["gelu_pytorch_tanh"]} or {', "gpt_neox_published"),
    ('"use_parallel_residual", True', '"use_parallel_residual", False', "gpt_neox_silent"),
    ('tap("k_rot", rotate(k, cos, sin))', 'tap("k_rot", rotate(k, cos, -sin))', "gpt_neox_yarn"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_neox", {"num_attention_heads": 7}, "num_attention_heads"),
    ("gpt_neox", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    ("gpt_neox", {"rope_theta": 777.0}, "rope_theta"),
    ("gpt_neox", {"partial_rotary_factor": 0.9}, "partial_rotary_factor"),
    ("gpt_neox", {"num_key_value_heads": 1}, "num_key_value_heads"),
]
