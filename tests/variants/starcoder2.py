"""StarCoder 2: windows shorter than prompts and none, with biases and without, the defaults of absent keys."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "starcoder2": Checks(
        config={
            "model_type": "starcoder2",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "norm_epsilon": 1e-3,
            "sliding_window": 7,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 2,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.c_proj in",
            "mlp_out": "mlp out",
        },
    )
}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    theta = config.pop("rope_parameters")["rope_theta"]
    old = {"torch_dtype": config.pop("dtype"), "rope_theta": theta, "mlp_type": "default", "norm_type": "layer_norm"}
    return config | old | {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = "hidden_act max_position_embeddings norm_epsilon num_key_value_heads rope_parameters sliding_window"
    meant += " tie_word_embeddings use_bias"
    return {key: value for key, value in config.items() if key not in meant.split()}


VARIANTS = {
    "starcoder2": Variant(family="starcoder2", head="tied", legacy=published, shard="60KB"),
    "starcoder2_no_bias": Variant(
        family="starcoder2", config={"use_bias": False, "tie_word_embeddings": False}, dtype=torch.bfloat16
    ),
    "starcoder2_silent": Variant(
        family="starcoder2",
        config={"norm_epsilon": 1e-5, "sliding_window": None} | rope("default", rope_theta=10000.0),
        head="other",
        legacy=silent,
    ),
    "starcoder2_linear": Variant(
        family="starcoder2",
        config={"num_key_value_heads": 1, "hidden_act": "gelu"} | rope("linear", factor=2.5),
        prefix=False,
        head="tied",
        dtype=torch.float16,
    ),
    "starcoder2_yarn": Variant(
        family="starcoder2",
        config={"sliding_window": LONGEST, "head_dim": 14}
        | rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4),
        head="tied",
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ('"norm_epsilon", 1e-5', '"rms_norm_eps", 1e-5', "starcoder2"),
    ('"norm_epsilon", 1e-5', '"norm_epsilon", 1e-6', "starcoder2_silent"),
    ('keys.size("num_key_value_heads", 2)', 'keys.size("num_key_value_heads", 6)', "starcoder2_silent"),
    ('keys.optional("sliding_window")', 'keys.optional("sliding_window", 8)', "starcoder2_silent"),
    ('"gelu_pytorch_tanh", ACTIVATIONS', '"gelu", ACTIVATIONS', "starcoder2_silent"),
    (", sees=c.sees))", "))", "starcoder2"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "starcoder2"),
    ("linear(m, w.down, w.down_bias)", "linear(m, w.down, w.o_bias)", "starcoder2_linear"),
    ("layer_norm(x, w.weight, w.bias, c.eps)", "layer_norm(x, w.weight, w.bias, 1e-5)", "starcoder2_no_bias"),
    ("scale=c.head_dim**-0.5", "scale=(c.hidden // c.heads) ** -0.5", "starcoder2_yarn"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("starcoder2", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
    ("starcoder2", {"hidden_act": "tanh"}, "hidden_act"),
    ("starcoder2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("starcoder2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]
