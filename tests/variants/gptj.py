"""GPT-J: shares of a head that are rotated, a head with a bias, files of every age."""

from typing import Any

import torch
from checkpoints import VOCAB, Checks, Draw, Tensors, Variant

CHECKS = {
    "gptj": Checks(
        config={
            "model_type": "gptj",
            "vocab_size": VOCAB,
            "n_embd": 60,
            "n_layer": 3,
            "n_head": 3,
            "n_inner": 101,
            "n_positions": 40,
            "rotary_dim": 6,
            "layer_norm_epsilon": 1e-3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        root="transformer.",
        embedding="wte.weight",
        layers="transformer.h",
        norm="transformer.ln_f",
        points={
            "q": "attn.q_proj out",
            "k": "attn.k_proj out",
            "v": "attn.v_proj out",
            "z": "attn.out_proj in",
            "attn_out": "attn out",
            "mlp_hidden": "mlp.fc_out in",
            "mlp_out": "mlp out",
        },
        sums="a + m + x",
    )
}


def buffers(config: dict[str, Any], draw: Draw) -> Tensors:
    """What old files hold and nobody reads."""
    side, layers = config["n_positions"], range(config["n_layer"])
    masks = {f"transformer.h.{layer}.attn.bias": draw(1, 1, side, side) for layer in layers}
    return masks | {f"transformer.h.{layer}.attn.masked_bias": draw(3) for layer in layers}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    config["torch_dtype"] = config.pop("dtype")
    own = {"rotary": True, "scale_attn_weights": True, "summary_use_proj": True, "gradient_checkpointing": False}
    return config | own


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("n_inner", "n_positions", "n_head", "rotary_dim", "activation_function", "layer_norm_epsilon")
    return {key: value for key, value in config.items() if key not in (*meant, "tie_word_embeddings")}


VARIANTS = {
    "gptj": Variant(family="gptj", shard="60KB"),
    "gptj_published": Variant(family="gptj", extra=buffers, legacy=published, dtype=torch.float16),
    "gptj_silent": Variant(
        family="gptj",
        config={"n_embd": 1024, "n_head": 16, "rotary_dim": 64, "n_inner": None, "n_positions": 2048, "n_layer": 1}
        | {"layer_norm_epsilon": 1e-5},
        legacy=silent,
    ),
    "gptj_whole_heads": Variant(
        family="gptj",
        config={"rotary_dim": 20, "activation_function": "gelu"},
        prefix=False,
        extra=buffers,
        dtype=torch.bfloat16,
    ),
    "gptj_tied": Variant(family="gptj", config={"n_inner": None}, gain=2.0, head="tied"),
    "gptj_other_head": Variant(family="gptj", config={"n_head": 1}, head="other"),
}

FAULTS: list[tuple[str, str, str]] = [
    ("a + m + x)", "x + a + m)", "gptj"),
    ("linear(x, w.unembed, w.bias)", "linear(x, w.unembed)", "gptj_tied"),
    ('"layer_norm_epsilon", 1e-5', '"layer_norm_epsilon", 1e-6', "gptj_silent"),
    ('keys.optional("rotary_dim", 64)', 'keys.optional("rotary_dim", 32)', "gptj_silent"),
    ("theta=10000.0", "theta=1000.0", "gptj"),
    ("/ divisor + mask", "* divisor + mask", "gptj_whole_heads"),
    ("rotate_pairs(k, cos, sin)", "rotate_pairs(k, cos, -sin)", "gptj_published"),
    ("(w.q, w.k, w.v)", "(w.k, w.q, w.v)", "gptj_other_head"),
    ("linear(m, w.down, w.down_bias)", "linear(m, w.down)", "gptj_whole_heads"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptj", {"n_head": 7}, "n_head"),
    ("gptj", {"rotary_dim": 7}, "rotary_dim"),
    ("gptj", {"rotary_dim": 22}, "rotary_dim"),
    ("gptj", {"activation_function": "tanh"}, "activation_function"),
    ("gptj", {"scale_attn_weights": False}, "scale_attn_weights"),
]
