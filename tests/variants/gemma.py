"""Gemma: what "gelu" means, heads of 256 dimensions by default, biases, ties, and the first files."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "gemma": Checks(
        config={
            "model_type": "gemma",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 14,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
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
SMALL = {"hidden_size": 48, "intermediate_size": 64}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the first files had it: the activation by its old name, rope in the old words, ties by default."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    del config["tie_word_embeddings"]
    return config | own | {"hidden_act": "gelu", "hidden_activation": None}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings")
    del config["rope_parameters"]["original_max_position_embeddings"]
    return {key: value for key, value in config.items() if key not in (*defaults, "rms_norm_eps")}


VARIANTS = {
    "gemma": Variant(family="gemma", head="tied"),
    "gemma_published": Variant(
        family="gemma", config={"hidden_act": "gelu"}, head="tied", dtype=torch.bfloat16, legacy=published
    ),
    "gemma_silent": Variant(
        family="gemma",
        config=SMALL
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 8192, **rope("yarn", factor=2.0, beta_slow=300)},
        legacy=silent,
    ),
    "gemma_bias": Variant(family="gemma", config={"attention_bias": True}, head="other", shard="60KB"),
    "gemma_mqa": Variant(
        family="gemma", config={"num_key_value_heads": 1}, head="alone", prefix=False, dtype=torch.float16
    ),
    "gemma_untied": Variant(
        family="gemma",
        config={"hidden_act": "silu", **rope("dynamic", factor=2.0), "max_position_embeddings": LONGEST - 8},
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("torch.tensor(c.hidden**0.5)", "torch.tensor(c.head_dim**0.5)", "gemma_published"),
    ('"gelu_pytorch_tanh" if named == "gelu" else named', "named", "gemma_published"),
    ('"head_dim": 256', '"head_dim": 128', "gemma_silent"),
    ('"max_position_embeddings": 8192', '"max_position_embeddings": 2048', "gemma_silent"),
    ('"hidden_act": "gelu_pytorch_tanh"', '"hidden_act": "silu"', "gemma_silent"),
    ('"tie_word_embeddings": True', '"tie_word_embeddings": False', "gemma_published"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "gemma_bias"),
    ("scale=c.head_dim**-0.5", "scale=(c.hidden // c.heads)**-0.5", "gemma"),
    ("rms_norm_gemma(m, w.mlp_norm, c.eps)", "rms_norm_gemma(m, w.attn_norm, c.eps)", "gemma_untied"),
    ("rms_norm_gemma(x, w.weight, c.eps)", "rms_norm_gemma(x, w.weight, 1e-6)", "gemma"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma", {"hidden_activation": "silu"}, "hidden_activation"),
    ("gemma", {"hidden_act": "mish"}, "hidden_act"),
    ("gemma", {"sliding_window": 8}, "sliding_window"),
]
